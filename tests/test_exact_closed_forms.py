"""With two responses every loss on pairs has an optimum in closed form; training finds it, and a wrong loss does not."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minidpo.commands.exact_train import train_to_convergence
from minidpo.commands.exact_world import best_scores, make_world, optimal_policy, total_variation
from minidpo.losses import dpo_loss, ipo_loss, simpo_loss

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def two_responses():
    """EOS or one word: every loss on pairs has a closed form."""
    return make_world(seed=1, prompts=1, words=1, max_tokens=1, hidden_size=8)


def margin(world, logps: Tensor) -> float:
    """log-ratio of the first response over the second one's."""
    g = logps - world.reference_logps
    return (g[0, 0] - g[0, 1]).item()


def test_two_responses_and_smoothed_labels_have_a_closed_form(two_responses):
    p, e, beta = two_responses.preferences[0, 0, 1].item(), 0.2, 0.5
    trained = train_to_convergence(
        two_responses, lambda b: dpo_loss(*b.logps, beta, label_smoothing=e).losses
    )
    q = (1 - e) * p + e * (1 - p)
    assert margin(two_responses, trained.values) == pytest.approx(math.log(q / (1 - q)) / beta, abs=1e-6)


def test_two_responses_and_ipo_have_a_closed_form(two_responses):
    """p*(y beats mu) = mu(y)/2 + mu(y') p, so h* has no mu left: (2p - 1) / (2 beta)."""
    p, beta = two_responses.preferences[0, 0, 1].item(), 0.3
    trained = train_to_convergence(two_responses, lambda b: ipo_loss(*b.logps, beta).losses)
    assert margin(two_responses, trained.values) == pytest.approx((2 * p - 1) / (2 * beta), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_two_responses_and_simpos_gamma_have_a_closed_form(two_responses, gamma):
    """The quadratic in `best_scores`: from a difference of rewards to one of average log-probs."""
    beta = 2.0
    trained = train_to_convergence(
        two_responses, lambda b: simpo_loss(*b.logps[:2], *b.lengths, beta, gamma).losses
    )
    difference = (two_responses.rewards[0, 0] - two_responses.rewards[0, 1]).item()
    ratio, k = math.exp(difference), math.exp(-gamma)
    u = ((ratio - 1) + math.sqrt((ratio - 1) ** 2 + 4 * k * k * ratio)) / (2 * k)
    averages = trained.values[0] / two_responses.lengths[0]
    assert beta * (averages[0] - averages[1]).item() == pytest.approx(math.log(u), abs=1e-6)


def test_gamma_stretches_small_differences_most(two_responses):
    """(1 + exp(gamma)) / 2 times near zero, gamma more far out."""
    gamma = 1.0
    for difference, stretched in [(1e-4, 1e-4 * (1 + math.e) / 2), (12.0, 12.0 + gamma)]:
        pair = replace(two_responses, rewards=torch.tensor([[difference, 0.0]], dtype=torch.float64))
        scores, _ = best_scores(pair, gamma=gamma)
        assert (scores[0, 0] - scores[0, 1]).item() == pytest.approx(stretched, rel=1e-4)


def test_a_wrong_loss_misses_the_optimum(two_responses):
    """Beta left out: converges, elsewhere."""
    trained = train_to_convergence(two_responses, lambda b: dpo_loss(*b.logps, 1.0).losses)
    best = optimal_policy(two_responses.reference_logps, two_responses.rewards, 0.5)
    assert total_variation(trained.values, best) > 100 * TOLERANCE
