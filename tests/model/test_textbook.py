"""minidpo/textbook.py against the fast path, on two pairs that can be followed by hand.

    pair 0   prompt 5 6        chosen 7 8 2    rejected 9 2
    pair 1   prompt 5 6 7      chosen 2        rejected 8 9 2       (2 is EOS)

Read this file with textbook.py beside it. It shows how pairs of token ids become padded rows and a mask, why
padding on the right needs no attention mask, and that one packed row gives the same log-probs, losses and
gradients.
"""

import copy
import math
from dataclasses import replace

import numpy as np
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
PACKED_PAIRS = PairTokens.from_pairs(TokenPair(*pair, index) for index, pair in enumerate(PAIRS))


def test_tokens_and_mask():
    """The chosen texts come first, then the rejected ones. The mask is true on response tokens, EOS too."""
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
    """The logits at t-1 predict token t. Ten tokens are equally likely, but for one position of row 0.

    In row 0, position 1 (token 6) predicts the first response token, 7. There token 7 gets the logit ln 11
    and the nine others 0, so its probability is 11 / (11 + 9) = 11/20. The responses have 3, 1, 2, 3 tokens:
        row 0: ln(11/20 * 1/100)    row 1: ln(1/10)    row 2: ln(1/100)    row 3: ln(1/1000)
    """
    tokens, mask = pad(PAIRS)
    logits = torch.zeros(4, 6, 10)
    logits[0, 1, 7] = math.log(11)
    expected = [math.log(p) for p in (11 / 2000, 1 / 10, 1 / 100, 1 / 1000)]
    assert sequence_logps(logits, tokens, mask).tolist() == pytest.approx(expected, rel=1e-6)


def test_padding():
    """Attention is causal and padding comes last, so no real token attends to it: its ids change nothing."""
    model = tiny_model()
    tokens, mask = pad(PAIRS)
    other = tokens.clone()
    other[0, 5:], other[1, 4:], other[2, 4:] = 33, 44, 55
    logps = sequence_logps(model(tokens), tokens, mask)
    assert torch.equal(logps, sequence_logps(model(other), other, mask))


def test_loss():
    """z = 0.1 * ((-10 + 12) - (-20 + 18)) = 0.1 * (2 + 2) = 0.4; -ln sigma(0.4) = ln(1 + e^-0.4) = 0.5130.

    The policy finds the chosen response 2 nats likelier than the reference does, the rejected one 2 less.
    """
    pi_w, pi_l, ref_w, ref_l = (torch.tensor([value]) for value in (-10.0, -20.0, -12.0, -18.0))
    assert dpo_loss(pi_w, pi_l, ref_w, ref_l, beta=0.1).item() == pytest.approx(0.5130152524)
    assert DPO(beta=0.1)(PairLogps(pi_w, pi_l, ref_w, ref_l)).item() == pytest.approx(0.5130152524)


def test_step():
    """One step of SGD at rate 1 moves every weight by its gradient: both ways move the policy alike.

    A step before it, at rate 0, leaves nothing behind; the reference gets no gradients.
    """
    policy, reference = tiny_model(1, torch.float64), tiny_model(2, torch.float64)
    twin = copy.deepcopy(policy)
    tokens, mask = pad(PAIRS)
    for lr in (0.0, 1.0):
        optimizer = torch.optim.SGD(policy.parameters(), lr)
        value = dpo_step(policy, reference, optimizer, tokens, mask, beta=0.3)
    assert all(parameter.grad is None for parameter in reference.parameters())

    # The same step by what train_dpo.py calls: the reference's log-probs are a column of the data.
    with torch.no_grad():
        pairs = replace(PACKED_PAIRS, ref_logps=response_logps(reference, pack(PACKED_PAIRS)).numpy())
    loss = DPO(beta=0.3)
    losses = loss(pair_logps(twin, pairs, np.arange(2), loss, torch.device("cpu"), "fp32"))
    (losses.sum() / 2).backward()
    assert losses.mean().item() == pytest.approx(value, rel=1e-12)
    for ours, theirs in zip(twin.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close((ours - ours.grad).detach(), theirs.detach(), rtol=1e-9, atol=1e-10)
