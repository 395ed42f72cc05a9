"""minidpo/textbook.py against the fast path, on two pairs that can be followed by hand.

    pair 0   prompt 5 6        chosen 7 8 2    rejected 9 2
    pair 1   prompt 5 6 7      chosen 2        rejected 8 9 2       (2 is EOS)

Read this file with textbook.py beside it. It shows how texts become tokens and a mask, why padding on the right needs
no attention mask, and that one packed row gives the same log-probs, losses and gradients.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch

from minidpo.data import PairTokens, TokenPair
from minidpo.losses import DPO, PairLogps
from minidpo.model import response_logps
from minidpo.packing import pack
from minidpo.textbook import dpo_loss, dpo_step, pad, sequence_logps
from minidpo.training.step import pair_logps
from tiny import tiny_model

PAIRS = [([5, 6], [7, 8, 2], [9, 2]), ([5, 6, 7], [2], [8, 9, 2])]


def packed_pairs() -> PairTokens:
    return PairTokens.from_pairs(TokenPair(*pair, index) for index, pair in enumerate(PAIRS))


def test_tokens_and_mask():
    """The chosen texts come first, then the rejected ones. The mask is true on response tokens, EOS included."""
    tokens, mask = pad(PAIRS)
    assert tokens.tolist() == [
        [5, 6, 7, 8, 2, 0],
        [5, 6, 7, 2, 0, 0],
        [5, 6, 9, 2, 0, 0],
        [5, 6, 7, 8, 9, 2],
    ]
    assert mask.int().tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1],
    ]


def test_log_probs():
    """The logits at t-1 predict token t. Here every token has probability 1/8 but for one position of row 0.

    In row 0 position 1 (token 6) predicts the first response token, 7. There token 7 gets the logit ln 9 and the seven
    others 0, so its probability is 9 / (9 + 7). The sums are those of 3, 1, 2 and 3 response tokens:
        row 0: ln(9/16) + 2 ln(1/8)    row 1: ln(1/8)    row 2: 2 ln(1/8)    row 3: 3 ln(1/8)
    """
    tokens, mask = pad([([5, 6], [7, 3, 2], [4, 2]), ([5, 6, 7], [2], [3, 4, 2])])
    logits = torch.zeros(4, 6, 8)
    logits[0, 1, 7] = math.log(9)
    eighth = math.log(1 / 8)
    expected = [math.log(9 / 16) + 2 * eighth, eighth, 2 * eighth, 3 * eighth]
    assert sequence_logps(logits, tokens, mask).tolist() == pytest.approx(expected, rel=1e-6)


def test_padding_needs_no_attention_mask():
    """Attention is causal and padding comes last, so no real token attends to it: other padding changes nothing."""
    model = tiny_model()
    tokens, mask = pad(PAIRS)
    other = tokens.clone()
    other[0, 5:], other[1, 4:], other[2, 4:] = 33, 44, 55
    with torch.no_grad():
        assert torch.equal(
            sequence_logps(model(tokens), tokens, mask), sequence_logps(model(other), other, mask)
        )


def test_loss():
    """z = 0.1 * ((-10 + 12) - (-20 + 18)) = 0.4, and -ln sigma(0.4) = ln(1 + e^-0.4) = 0.5130."""
    pi_w, pi_l, ref_w, ref_l = (torch.tensor([value]) for value in (-10.0, -20.0, -12.0, -18.0))
    assert dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=0.1).item() == pytest.approx(0.5130152524)
    assert DPO(beta=0.1)(PairLogps(pi_w, pi_l, ref_w, ref_l)).item() == pytest.approx(0.5130152524)


def test_packed_log_probs():
    """One row of 14 tokens holds what four padded rows of 24 tokens hold: each prompt is computed once."""
    model = tiny_model(dtype=torch.float64)
    tokens, mask = pad(PAIRS)
    batch = pack(packed_pairs())
    assert batch.tokens.tolist() == [5, 6, 7, 8, 2, 9, 2] + [5, 6, 7, 2, 8, 9, 2]
    padded = sequence_logps(model(tokens), tokens, mask).view(2, 2).T  # (pairs, chosen and rejected)
    torch.testing.assert_close(response_logps(model, batch), padded, rtol=1e-12, atol=1e-12)


def test_a_step():
    """One step of SGD at rate 1 moves every weight by its gradient: both ways move the policy alike."""
    policy, reference = tiny_model(1, torch.float64), tiny_model(2, torch.float64)
    twin = copy.deepcopy(policy)
    tokens, mask = pad(PAIRS)
    value = dpo_step(policy, reference, torch.optim.SGD(policy.parameters(), lr=1.0), tokens, mask, beta=0.3)

    # The same step by what train_dpo.py calls: the reference's log-probs are a column of the data.
    pairs, cpu = packed_pairs(), torch.device("cpu")
    with torch.no_grad():
        reference_logps = response_logps(reference, pack(pairs))
    pairs = replace(pairs, ref_logps=reference_logps.numpy())
    loss = DPO(beta=0.3)
    losses = loss(pair_logps(twin, pairs, torch.arange(2).numpy(), loss, cpu, "fp32"))
    (losses.sum() / 2).backward()
    assert losses.mean().item() == pytest.approx(value, rel=1e-12)
    for ours, theirs in zip(twin.parameters(), policy.parameters(), strict=True):
        moved = ours if ours.grad is None else ours - ours.grad
        torch.testing.assert_close(moved.detach(), theirs.detach(), rtol=1e-9, atol=1e-10)
