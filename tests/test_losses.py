"""The mathematics in minidpo/losses.py is the mathematics in the papers.

What holds for every loss is asked by tests/battery.py of every entry of tests/loss_table.py; what a single
loss promises stands below.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import battery
import refusals
from battery import Loss
from equations import LENGTHS
from loss_table import LOSSES, dpo
from minidpo.losses import bradley_terry_loss, center_penalty, dpo_loss, ipo_loss, sft_loss, simpo_loss

PAIRS, EXAMPLES = 32, 80  # 2,560 generated pairs a loss
RANGES = {"beta": (0.01, 5.0), "gamma": (-2.0, 5.0), "margin": (-3.0, 3.0), "label_smoothing": (0.0, 0.49)}
SMOOTHED = pytest.mark.parametrize("e", [0.05, 0.1, 0.3])


@pytest.mark.parametrize("check", battery.LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_battery(loss, check):
    check(loss)


@st.composite
def arguments_of(draw, loss: Loss) -> battery.Arguments:
    """Pairs and their settings: log-probs in [-300, 0], lengths 1 to 300, settings in RANGES, or up to their own."""
    each = {"fill": st.nothing()}  # every number drawn by itself, none filled in
    unit = draw(hnp.arrays(np.float64, (len(loss.inputs), PAIRS), elements=st.floats(0, 1), **each))
    lengths = draw(hnp.arrays(np.int64, (len(loss.lengths), PAIRS), elements=st.integers(1, 300), **each))
    drawn = {name: battery.from_unit(name, row, 300.0) for name, row in zip(loss.inputs, unit, strict=True)}
    drawn |= dict(zip(loss.lengths, lengths, strict=True))
    ranges = {name: RANGES.get(name, (0.5 * value, value)) for name, value in loss.settings.items()}
    return drawn | {name: draw(st.floats(*between)) for name, between in ranges.items()}


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_numpy_twin_agrees_on_thousands_of_generated_pairs(loss):
    @settings(max_examples=EXAMPLES, deadline=None)
    @given(arguments_of(loss))
    def agrees(arguments):
        battery.check_twin(loss, arguments)

    agrees()


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_bad_arguments_are_refused_by_name_and_value(loss):
    refusals.check_refusals(loss)


@pytest.mark.parametrize("function", [dpo_loss, ipo_loss])
def test_one_length_without_the_other_is_refused(function):
    refusals.check_lone_length(function)


# --- anchors: what a run must print at step 0 ---------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("lengths", [{}, dict.fromkeys(LENGTHS, torch.tensor([3, 9]))])
def test_policy_equal_to_reference_gives_ln_2_for_dpo_and_1_over_4_beta_squared_for_ipo(beta, lengths):
    logps = (torch.tensor([-5.0, -70.0]), torch.tensor([-8.0, -20.0]))
    for e in (0.0, 0.2):
        losses, *rewards = dpo_loss(*logps, *logps, beta=beta, label_smoothing=e, **lengths)
        assert losses.tolist() == pytest.approx([math.log(2)] * 2)  # at z = 0 smoothing changes nothing
        assert all((r == 0).all() for r in rewards)
    ipo = ipo_loss(*logps, *logps, beta=beta, **lengths).losses
    assert ipo.tolist() == pytest.approx([1 / (4 * beta**2)] * 2)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_equal_averages_give_simpo_ln_of_1_plus_exp_gamma(gamma):
    chosen, rejected = torch.tensor([-4.0, -30.0]), torch.tensor([-6.0, -10.0])
    losses = simpo_loss(chosen, rejected, torch.tensor([2, 6]), torch.tensor([3, 2]), gamma=gamma).losses
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(gamma))] * 2)


# --- which way learning pushes ------------------------------------------------------------------------------


def slopes_in_z(function, *z: float) -> list[float]:
    """d loss / d z at each z."""
    at = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(at).sum(), at)[0].tolist()


def logistic(e: float = 0.0):
    return lambda z: bradley_terry_loss(z, torch.zeros_like(z), label_smoothing=e)


def ipo_of_h(beta: float):
    return lambda h: ipo_loss(h, *(torch.zeros_like(h) for _ in range(3)), beta=beta).losses


@pytest.mark.parametrize("loss", [x for x in LOSSES if x.settings.get("label_smoothing") == 0.0], ids=str)
def test_the_gradient_on_chosen_is_negative_and_on_rejected_positive(loss):
    tensors = loss.tensors(loss.draw(200))
    gradients = loss.gradients(tensors, loss.losses(tensors))
    assert (gradients[loss.inputs[0]] < 0).all() and (gradients[loss.inputs[1]] > 0).all()


def test_the_gradient_on_r_chosen_is_minus_the_probability_of_the_wrong_order():
    # z = ln 3: sigma(-z) = 1 / (1 + 3) = 1/4
    assert slopes_in_z(logistic(), 0.0, math.log(3), -math.log(3)) == pytest.approx([-1 / 2, -1 / 4, -3 / 4])


def test_maximum_likelihood_weighs_every_token_of_a_response_alike():
    logps = torch.tensor([-8.0, -8.0], requires_grad=True)
    sft_loss(logps, torch.tensor([2, 8])).sum().backward()
    assert logps.grad.tolist() == [-1 / 2, -1 / 8]


def test_an_equal_repetition_leaves_simpo_as_it_is_but_a_longer_chosen_response_lowers_its_reward():
    def reward(logp: float, length: int) -> float:
        one = torch.tensor([logp])
        return simpo_loss(one, one, torch.tensor([length]), torch.tensor([length])).chosen_rewards.item()

    assert reward(-12.0, 6) == reward(-24.0, 12) == -4.0  # 2 * -12/6
    assert reward(-24.0, 6) == -8.0  # twice the nats over the same tokens


# --- where the losses are flat and where they have no bound -------------------------------------------------


def test_plain_logistic_loss_has_no_minimum_only_a_limit():
    losses = logistic()(torch.tensor([10.0, 100.0, 700.0, -10.0, -1e4], dtype=torch.float64))
    assert (losses[:3].diff() < 0).all() and (
        losses[:3] > 0
    ).all()  # ever smaller, never 0: the margin runs away
    assert losses[3:].tolist() == pytest.approx(
        [10 + math.exp(-10), 1e4], rel=1e-8
    )  # -z where the order is wrong
    assert slopes_in_z(logistic(), 40.0, -40.0) == pytest.approx([0.0, -1.0], abs=1e-15)


@SMOOTHED
def test_smoothed_loss_is_lowest_at_ln_1_minus_e_over_e_where_it_is_the_entropy_of_the_labels(e):
    optimum = math.log((1 - e) / e)
    entropy = -(1 - e) * math.log(1 - e) - e * math.log(e)
    assert slopes_in_z(logistic(e), optimum)[0] == pytest.approx(0, abs=1e-15)
    at, left, right = logistic(e)(torch.tensor([optimum, optimum - 0.1, optimum + 0.1], dtype=torch.float64))
    assert at.item() == pytest.approx(entropy, rel=1e-14) and left > at < right


@SMOOTHED
def test_smoothed_loss_rises_without_bound_on_both_sides_by_1_minus_e_and_e(e):
    assert slopes_in_z(logistic(e), -50.0, 50.0) == pytest.approx([-(1 - e), e])


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_ipo_is_flat_at_its_target_and_rises_as_a_square_on_both_sides(beta):
    target = 1 / (2 * beta)
    assert slopes_in_z(ipo_of_h(beta), target, target + 3, target - 3) == pytest.approx([0, 6, -6])
    losses = ipo_of_h(beta)(torch.tensor([target, target + 1e3, target - 1e3], dtype=torch.float64))
    assert losses.tolist() == pytest.approx([0, 1e6, 1e6])


def test_centring_is_zero_and_flat_wherever_the_two_rewards_are_opposite():
    chosen = torch.tensor([0.0, 2.0, -1e4], requires_grad=True)
    penalty = center_penalty(chosen, -chosen.detach())
    penalty.sum().backward()
    assert penalty.tolist() == [0, 0, 0] and chosen.grad.tolist() == [0, 0, 0]


def test_maximum_likelihood_is_zero_at_certainty_and_has_no_upper_bound():
    losses = sft_loss(torch.tensor([0.0, -1e4, -1e8]), torch.tensor([5, 2, 1]))
    assert losses.tolist() == [0.0, 5e3, 1e8]


# --- the forms that other code means by the same name -------------------------------------------------------


def test_gamma_is_beta_times_the_ratio_that_other_code_takes():
    chosen, rejected, lengths = torch.tensor([-9.0]), torch.tensor([-7.0]), torch.tensor([4])
    beta, ratio = 2.5, 0.3
    others = torch.nn.functional.softplus(-beta * (chosen / lengths - rejected / lengths - ratio))
    ours = simpo_loss(chosen, rejected, lengths, lengths, beta=beta, gamma=beta * ratio).losses
    assert ours.item() == pytest.approx(others.item())


def test_dpo_is_bradley_terry_on_its_own_rewards():
    losses, chosen_rewards, rejected_rewards = dpo_loss(**dpo.tensors(dpo.draw(16)))
    assert torch.equal(losses, bradley_terry_loss(chosen_rewards, rejected_rewards))
