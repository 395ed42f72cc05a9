"""The mathematics in minidpo/losses/ is the mathematics in the papers.

What holds for every loss is asked by battery.py of every entry of loss_table.py; what a single loss promises
stands below.
"""

import math

import battery
import numpy as np
import pytest
import torch
from case import Arrays, Case, Optimum, close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from loss_table import CASES, bradley_terry, dpo, simpo

from minidpo.losses import DPO, IPO, LOSSES, PairLogps, SimPO, logistic
from minidpo.losses import bradley_terry as bradley_terry_loss
from minidpo.verify.exact_train import train_to_convergence
from minidpo.verify.exact_world import make_world, total_variation

PAIRS, EXAMPLES = 32, 80  # 2,560 generated pairs per loss
RANGES = {"beta": (0.01, 5.0), "gamma": (0.0, 5.0), "margin": (0.0, 3.0), "label_smoothing": (0.0, 0.49)}


@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_battery(case, check):
    check(case)


def test_every_loss_is_described():
    """By a point computed by hand, and by its optimum or the reason why none is known."""
    described = {case.loss.name: case for case in CASES if case.points and case.optimum}
    missing = set(LOSSES) - set(described)
    assert not missing, f"no point, or neither an optimum nor the reason why none is known: {missing}"
    for name, loss in LOSSES.items():
        assert name == loss.name and loss.equation and loss.gradient and loss.__doc__, name


WITH_OPTIMUM = [case for case in CASES if isinstance(case.optimum, Optimum) and not case.label]


@pytest.mark.parametrize("case", WITH_OPTIMUM, ids=str)
def test_optimum(case):
    """Training a transformer ends at the policy that was derived on paper."""
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    best = case.optimum.policy(world)
    assert total_variation(world.reference_logps, best) > 0.05  # there was something to learn
    assert total_variation(train_to_convergence(world, case.optimum.loss).values, best) < 1e-5


@st.composite
def generated(draw, case: Case) -> tuple[Case, Arrays]:
    """Log-probs in [-300, 0], lengths from 1 to 300, settings in RANGES or up to the case's own."""
    each = {"fill": st.nothing()}  # every number is drawn by itself
    unit = draw(hnp.arrays(np.float64, (len(case.inputs), PAIRS), elements=st.floats(0, 1), **each))
    lengths = draw(hnp.arrays(np.int64, (len(case.lengths), PAIRS), elements=st.integers(1, 300), **each))
    arrays = {name: case.from_unit(name, row, 300.0) for name, row in zip(case.inputs, unit, strict=True)}
    arrays |= dict(zip(case.lengths, lengths, strict=True))
    ranges = {name: RANGES.get(name, (0.5 * value, value)) for name, value in case.numbers.items()}
    return case.with_settings(**{name: draw(st.floats(*range_)) for name, range_ in ranges.items()}), arrays


@pytest.mark.parametrize("case", [case for case in CASES if case.twin], ids=str)
def test_generated_pairs(case):
    """The loss is finite and the NumPy twin agrees on thousands of them."""

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(generated(case))
    def agrees(drawn):
        case, arrays = drawn
        losses = case.losses(case.pairs(arrays))
        assert losses.isfinite().all()
        close(losses, case.written(case.twin, arrays), atol=1e-11)

    agrees()


# --- what a run must print at step 0 ------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.1, 7.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_policy_equal_to_reference(beta, per_token):
    """DPO is ln 2, IPO 1/(4 beta^2), and no reward or margin has moved yet."""
    logps = torch.tensor([-5.0, -70.0]), torch.tensor([-8.0, -20.0])
    pairs = PairLogps(*logps, *logps, torch.tensor([3, 9]), torch.tensor([8, 2]))
    for e in (0.0, 0.2):  # at z = 0 smoothing changes nothing
        loss = DPO(beta, label_smoothing=e, length_normalize=per_token)
        assert loss(pairs).tolist() == pytest.approx([math.log(2)] * 2)
        metrics = loss.metrics(pairs, loss(pairs))
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert metrics[name].tolist() == [0, 0], name
    assert IPO(beta, per_token)(pairs).tolist() == pytest.approx([1 / (4 * beta**2)] * 2)


# --- which way learning pushes, and where it ends -----------------------------------------------------------


def slopes(function, *at: float) -> list[float]:
    """d function / d z at each z."""
    z = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(z).sum(), z)[0].tolist()


def ipo_of_h(beta: float):
    return lambda h: IPO(beta)(PairLogps(h, *(torch.zeros_like(h) for _ in range(3))))


@pytest.mark.parametrize("case", [dpo, simpo, bradley_terry], ids=str)
def test_learning_raises_the_chosen_response(case):
    """d loss / d chosen is negative and d loss / d rejected positive, for every pair."""
    pairs = case.pairs(case.draw(200))
    gradients = case.gradients(pairs, case.losses(pairs))
    assert (gradients["chosen"] < 0).all() and (gradients["rejected"] > 0).all()


def test_logistic_has_no_minimum():
    """Ever smaller and never 0: the margin runs away. Where the order is wrong, the loss is -z."""
    losses = logistic(torch.tensor([10.0, 100.0, 700.0, -10.0, -1e4], dtype=torch.float64))
    assert (losses[:3].diff() < 0).all() and (losses[:3] > 0).all()
    assert losses[3:].tolist() == pytest.approx([10 + math.exp(-10), 1e4], rel=1e-8)


@pytest.mark.parametrize("e", [0.05, 0.1, 0.3])
def test_smoothed_logistic(e):
    """Lowest at ln((1-e)/e), where it is the entropy of the labels; beside it slopes of -(1-e) and e."""
    optimum = math.log((1 - e) / e)
    entropy = -(1 - e) * math.log(1 - e) - e * math.log(e)
    at, left, right = logistic(torch.tensor([optimum, optimum - 0.1, optimum + 0.1], dtype=torch.float64), e)
    assert at.item() == pytest.approx(entropy, rel=1e-14) and left > at < right
    expected = pytest.approx([0, -(1 - e), e], abs=1e-15)
    assert slopes(lambda z: logistic(z, e), optimum, -50.0, 50.0) == expected


@pytest.mark.parametrize("beta", [0.05, 0.5, 2.0])
def test_ipo_is_a_parabola(beta):
    """It is flat at its target and rises as a square on both sides."""
    target = 1 / (2 * beta)
    assert slopes(ipo_of_h(beta), target, target + 3, target - 3) == pytest.approx([0, 6, -6])
    losses = ipo_of_h(beta)(torch.tensor([target, target + 1e3, target - 1e3], dtype=torch.float64))
    assert losses.tolist() == pytest.approx([0, 1e6, 1e6])


# --- the forms that other code means by the same name -------------------------------------------------------


def test_gamma_beta_ratio():
    """Code that takes it means gamma / beta."""
    pairs, beta, ratio = simpo.pairs(simpo.draw(16)), 2.5, 0.3
    chosen, rejected = pairs.mean_logps()
    theirs = torch.nn.functional.softplus(-beta * (chosen - rejected - ratio))
    close(SimPO(beta, gamma=beta * ratio)(pairs), theirs, rtol=1e-9)


def test_dpo_is_bradley_terry():
    """On its own rewards."""
    pairs = dpo.pairs(dpo.draw(16))
    assert torch.equal(DPO()(pairs), bradley_terry_loss(*DPO().rewards(pairs)))
