"""What stays in float32 under bf16 autocast, and what is added up in float64."""

import numpy as np
import torch
from torch import Tensor

from minidpo.data import PairTokens
from minidpo.logprobs import sum_by_response
from minidpo.packing import pack
from tiny import random_pairs, tiny_reward_model


def is_rounded_to_bf16(values: Tensor) -> bool:
    return torch.equal(values, values.bfloat16().to(values.dtype))


def test_the_reward_head_is_a_float32_product_under_autocast():
    """A reward near 1 would step by 1/128 in bf16: many pairs would tie."""
    model = tiny_reward_model()
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rewards = model.rewards_of(hidden)
    assert rewards.dtype == torch.float32
    exact = hidden.double() @ model.score.weight[0].detach().double()
    torch.testing.assert_close(rewards.detach().double(), exact, rtol=1e-5, atol=1e-5)


def test_rewards_of_packed_pairs_are_float32_under_autocast():
    pairs = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 8))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rewards, _ = tiny_reward_model().forward_packed(pack(pairs, scored=0))
    assert rewards.dtype == torch.float32 and not is_rounded_to_bf16(rewards)


def test_token_log_probs_are_added_up_in_float64():
    """2^24 + 1 is no float32: each of the 64 ones would be lost on its way into a float32 sum."""
    sums = sum_by_response(torch.tensor([-(2.0**24)] + [-1.0] * 64 + [-3.0]), torch.tensor([65, 1]))
    assert sums.dtype == torch.float32
    assert sums.tolist() == [-(2.0**24) - 64, -3.0]
