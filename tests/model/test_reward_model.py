"""The reward model: a score read at the last token of each response."""

import numpy as np
import pytest
import torch
from test_packing import THREE_PAIRS, packed
from torch.testing import assert_close

from minidpo.model import hidden_states
from minidpo.model.reward_model import fresh_score
from tiny import gradients, naive_logps, naive_rewards, random_pairs, relative_difference, tiny_reward_model


def test_rewards(form=packed):
    """Rewards, the chosen response's log-prob and the gradients are those of one row per text. The rewards are
    read at each response's last token, chosen first; they come from the head alone."""
    model = tiny_reward_model(dtype=torch.float64)
    rewards, logps = model.forward_packed(form(THREE_PAIRS, scored=1))
    naive = naive_rewards(model, THREE_PAIRS), naive_logps(model, THREE_PAIRS)[:, :1]
    assert_close((rewards, logps), naive, rtol=1e-11, atol=1e-11)
    ours, theirs = (gradients(model, r[:, 0].sum() - r[:, 1].sum() / 2) for r in (rewards, naive[0]))
    assert relative_difference(ours, theirs) < 1e-11 and not ours["lm_head.weight"].any()
    assert model.forward_packed(packed(THREE_PAIRS, scored=0))[1] is None


def test_new_head():
    """It is drawn from N(0, 1 / (hidden + 1))."""
    assert fresh_score(9999).std().item() == pytest.approx(0.01, rel=0.05)


def test_head_in_float32():
    """Under autocast too: a reward near 1 would step by 1/128 in bf16, and many pairs would tie."""
    model, batch = tiny_reward_model(), packed(random_pairs(np.random.default_rng(0), 8), scored=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        of_pairs, last = model.forward_packed(batch)[0], hidden_states(model, batch)[batch.last]
    assert_close(of_pairs, last.float() @ model.score.weight[0].detach(), rtol=1e-5, atol=1e-5)
    assert of_pairs.dtype == torch.float32 and not torch.equal(of_pairs, of_pairs.bfloat16().float())
