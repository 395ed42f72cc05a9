"""DPO in fifty lines: two padded rows per pair, all logits, two models. Nothing is made fast.

train_dpo.py computes the same losses and gradients in less time and memory. tests/model/test_textbook.py
holds both against each other, README.md shows this file, and `bench` measures against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad(pairs: list[tuple[list[int], list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(prompt, chosen, rejected) ids of B pairs -> tokens (2B, T), padded on the right, and a mask (2B, T).

    The first B rows are prompt + chosen, the last B rows prompt + rejected. The mask is true on response
    tokens.
    """
    texts = [(p, c) for p, c, _ in pairs] + [(p, r) for p, _, r in pairs]
    width = max(len(prompt) + len(response) for prompt, response in texts)
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        mask[row, len(prompt) : end] = True
    return tokens, mask


def sequence_logps(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) of each row (R,): the log-probs of its response tokens, summed. The logits at t-1 predict
    token t."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (R, T-1)
    return (logps * mask[:, 1:]).sum(-1)


def dpo_loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """Rafailov et al. 2023, Eq. 7: one loss per pair (B,)."""
    return -F.logsigmoid(beta * ((pi_w - ref_w) - (pi_l - ref_l)))


def dpo_step(
    policy: nn.Module, reference: nn.Module, optimizer, tokens: Tensor, mask: Tensor, beta: float = 0.1
) -> float:
    """One step on a batch of pairs. reference = copy.deepcopy(policy) before the first step, never trained.

    policy(tokens) are logits (2B, T, V). Attention is causal, so padding on the right needs no mask.
    """
    pi = sequence_logps(policy(tokens), tokens, mask)
    with torch.no_grad():
        ref = sequence_logps(reference(tokens), tokens, mask)
    (pi_w, pi_l), (ref_w, ref_l) = pi.chunk(2), ref.chunk(2)
    loss = dpo_loss(pi_w, pi_l, ref_w, ref_l, beta).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
