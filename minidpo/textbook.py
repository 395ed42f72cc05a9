"""DPO on one page: padded rows, all logits, two models. Nothing is made fast.

train_dpo.py computes the same losses and gradients in less time and memory. README.md shows this file,
tests/model/test_textbook.py compares the two, and `python -m minidpo bench --against textbook` times them.
Dimensions: B pairs, R = 2B padded rows, T tokens per row, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pad(pairs: list[tuple[list[int], list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Token ids (prompt, chosen, rejected) of B pairs -> tokens (2B, T) and mask (2B, T).

    The first B rows are prompt + chosen, the last B rows prompt + rejected, padded on the right. The mask is
    true on response tokens, because only they are scored.
    """
    texts = [(prompt, chosen) for prompt, chosen, _ in pairs]
    texts += [(prompt, rejected) for prompt, _, rejected in pairs]
    width = max(len(prompt) + len(response) for prompt, response in texts)
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        tokens[i, :end] = torch.tensor(prompt + response)
        # The mask is set by position: the padding id may also be that of a real token, such as EOS.
        mask[i, len(prompt) : end] = True
    return tokens, mask


def sequence_logps(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log pi(y|x) of response y to prompt x, (R,): the log-probs of a row's response tokens, summed."""
    # The logits at position t-1 predict token t, so logits lose their last position and tokens their first.
    vocabulary_logps = logits[:, :-1].log_softmax(-1)  # (R, T-1, V)
    logps = vocabulary_logps.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (R, T-1)
    # The mask is shifted like the tokens. It leaves out the prompt and the padding.
    return (logps * mask[:, 1:]).sum(-1)


def dpo_loss(pi_w: Tensor, pi_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> Tensor:
    """Rafailov et al. 2023, Eq. 7: one loss per pair (B,). w: chosen ("winning"), l: rejected ("losing")."""
    # log pi(y|x)/pi_ref(y|x): how much more likely the policy finds each response than the reference does.
    chosen_log_ratio = pi_w - ref_w
    rejected_log_ratio = pi_l - ref_l
    return -F.logsigmoid(beta * (chosen_log_ratio - rejected_log_ratio))


def dpo_step(
    policy: nn.Module, reference: nn.Module, optimizer, tokens: Tensor, mask: Tensor, beta: float = 0.1
) -> float:
    """One optimizer step on B pairs; returns their mean loss.

    Before the first step, reference = copy.deepcopy(policy). It is never trained.
    """
    # Forward pass: a model turns tokens (2B, T) into logits (2B, T, V). Attention is causal and padding is on
    # the right, so no real token attends to padding and no attention mask is needed.
    pi = sequence_logps(policy(tokens), tokens, mask)
    # The reference is a constant of the loss, so no activations are kept for a backward pass.
    with torch.no_grad():
        ref = sequence_logps(reference(tokens), tokens, mask)

    # Loss: the first half of the rows holds the chosen responses, the second half the rejected ones.
    (pi_w, pi_l), (ref_w, ref_l) = pi.chunk(2), ref.chunk(2)
    loss = dpo_loss(pi_w, pi_l, ref_w, ref_l, beta).mean()

    # Backward pass and update. PyTorch adds to existing gradients, so those of the last step are cleared.
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
