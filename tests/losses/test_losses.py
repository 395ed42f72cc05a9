"""Every loss of the table is put to every check of minidpo/verify/checks.py, on the claims of its file."""

import math

import pytest
import torch

from minidpo.losses import LOSSES
from minidpo.verify.checks import CHECKS
from minidpo.verify.claims import claims_of, every_loss
from minidpo.verify.draws import draw, evaluate, tensors
from minidpo.verify.exact_world import make_world, total_variation
from minidpo.verify.report import HOLDS, NOT_ASKED, verify

EVERY = every_loss()
each_loss = pytest.mark.parametrize("loss", EVERY.values(), ids=EVERY)
OUT_OF_RANGE = {"beta": [0.0, -0.1], "label_smoothing": [-0.1, 0.5, 1.0], "flip_rate": [0.5]}


@pytest.mark.parametrize("check", CHECKS)
@each_loss
def test_claims(loss, check):
    """What minidpo/verify/claims/NAME.py claims of the loss holds, at all settings of its points."""
    (verdict,) = verify(loss(), checks=[check]).verdicts
    assert verdict.verdict in (HOLDS, NOT_ASKED), verdict.counterexample


@each_loss
def test_described(loss):
    """Every loss has points computed by hand that use all its settings, a twin (the same loss in NumPy), a
    gradient, an optimum or the reason why none is known, and its texts. No optimum is where training begins."""
    claims = claims_of(loss)
    assert {name for settings, _, _ in claims.points for name in settings} == set(vars(loss()))
    assert claims.points and claims.optimum and claims.twin and claims.gradient
    # The optimum is a text (the reason why there is none), or a function, with settings to check it at.
    assert isinstance(claims.optimum, str) != bool(claims.optima)
    assert loss.equation and loss.__doc__ and (loss.name not in LOSSES or LOSSES[loss.name] is loss)
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    for settings in claims.optima.values():
        assert total_variation(world.reference_logps, claims.optimum(world, loss(**settings))) > 0.05


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradient_weights(loss):
    """The gradient weight of a response is -d loss / d log pi(y|x)."""
    claims = claims_of(loss)
    pairs = tensors(claims, draw(claims, 16))
    _, gradients = evaluate(loss(), pairs)
    for name, weight in zip(
        ("chosen", "rejected")[: loss.responses], loss().gradient_weights(pairs), strict=True
    ):
        torch.testing.assert_close(weight, -gradients[name], rtol=0, atol=0)


@each_loss
def test_settings(loss):
    """A number out of its range is refused in words that name it, its value and what it must be."""
    for name in (name for name, value in vars(loss()).items() if isinstance(value, float)):
        for value in (*OUT_OF_RANGE.get(name, [-1.0]), math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} is {value}; it must be "):
                loss(**{name: value})
