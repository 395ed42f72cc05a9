"""What is asked of all losses together. Each has a file of its own, test_NAME.py, with its CLAIMS."""

import math
from importlib import import_module

import pytest
import test_reward
from loss_checks import draw, evaluate, tensors

from minidpo.losses import DPO, LOSSES, BradleyTerry, SimPO
from minidpo.verify.exact_train import train_to_convergence
from minidpo.verify.exact_world import make_world, total_variation

CLAIMS = {loss: import_module(f"test_{name}").CLAIMS for name, loss in LOSSES.items()}
WITH_OPTIMUM = [loss for loss, claims in CLAIMS.items() if not isinstance(claims.optimum, str)]
CLAIMS[BradleyTerry] = test_reward.CLAIMS
NEVER = {"beta": [0.0, -0.1], "label_smoothing": [-0.1, 0.5, 1.0]}


@pytest.mark.parametrize("loss", LOSSES.values())
def test_described(loss):
    """Every loss has a point computed by hand, an optimum or the reason why none is known, and its texts."""
    assert CLAIMS[loss].points and CLAIMS[loss].optimum
    assert LOSSES[loss.name] is loss and loss.equation and loss.gradient and loss.__doc__


@pytest.mark.parametrize("loss", WITH_OPTIMUM)
def test_optimum(loss):
    """Training a transformer in the exact world ends at the policy that was derived on paper."""
    settings, policy = CLAIMS[loss].optimum
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    assert total_variation(world.reference_logps, policy(world)) > 0.05  # there was something to learn
    assert total_variation(train_to_convergence(world, loss(**settings)).values, policy(world)) < 1e-5


@pytest.mark.parametrize("loss", [DPO(), SimPO(), BradleyTerry(lm_weight=0.0)], ids=str)
def test_direction(loss):
    """Learning raises the chosen response and lowers the rejected one, whatever the pair."""
    claims = CLAIMS[type(loss)]
    _, gradients = evaluate(loss, tensors(claims, draw(claims, 200)))
    assert (gradients["chosen"] < 0).all() and (gradients["rejected"] > 0).all()


@pytest.mark.parametrize("loss", CLAIMS)
def test_settings(loss):
    """A number out of its range is refused in words that name it, its value and what it must be."""
    for name in (name for name, value in vars(loss()).items() if isinstance(value, float)):
        for value in (*NEVER.get(name, [-1.0]), math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} is {value}; it must be "):
                loss(**{name: value})
