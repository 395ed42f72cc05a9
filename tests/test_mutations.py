"""Break the mathematics on purpose, one place at a time: no broken copy may survive the battery.

A mutation of loss_mutations.py or gatherer_mutations.py replaces text in the source of minidpo/losses.py or
minidpo/logprobs.py; the mutant is executed as a module of its own and handed to the checks of battery.py and
refusals.py, or of gatherer.py. It counts as caught when a check fails, or when the mutant
refuses or cannot compute what is right. A mutant that does not even know its own names proves nothing:
NameError, TypeError and the like fail the test.
"""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import battery
import gatherer
import refusals
from gatherer_mutations import GATHERER_MUTATIONS
from loss_mutations import LOSS_MUTATIONS
from loss_table import LOSSES
from minidpo import logprobs, losses

CAUGHT = (AssertionError, ValueError, RuntimeError)
# Finite differences are left out: slow, and the closed forms already catch everything they would.
CHECKS = [check for check in battery.LOSS_CHECKS if check is not battery.check_derivatives]


def prove_losses(module: ModuleType) -> None:
    """What the battery claims of minidpo.losses, claimed of `module`."""
    described = [replace(loss, function=getattr(module, loss.function.__name__)) for loss in LOSSES]
    for check in (*CHECKS, refusals.check_refusals):
        for loss in described:
            check(loss)
    refusals.check_lone_length(module.dpo_loss)
    refusals.check_lone_length(module.ipo_loss)


def prove_gatherer(module: ModuleType) -> None:
    """What is claimed of minidpo.logprobs, claimed of `module`."""
    for check in gatherer.GATHERER_CHECKS:
        check(module)


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of the module in which `new` stands for `old`, which must occur exactly once."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times: the mutation is out of date"
    copy = ModuleType(f"mutant of {module.__name__}")
    exec(compile(source.replace(old, new), copy.__name__, "exec"), copy.__dict__)
    return copy


def each(mutations: dict[str, dict[str, str]]):
    """(old, new) for every mutation, tests named after it."""
    cases = [
        pytest.param(old, new, id=name) for old, named in mutations.items() for name, new in named.items()
    ]
    assert len({case.id for case in cases}) == len(cases), "two mutations of one name"
    return pytest.mark.parametrize(("old", "new"), cases)


def test_the_unbroken_modules_pass():
    prove_losses(mutant(losses, "import torch\n", "import torch\n"))
    prove_gatherer(mutant(logprobs, "import torch\n", "import torch\n"))


@each(LOSS_MUTATIONS)
def test_a_broken_loss_is_caught(old, new):
    broken = mutant(losses, old, new)
    with pytest.raises(CAUGHT):
        prove_losses(broken)


@each(GATHERER_MUTATIONS)
def test_a_broken_gatherer_is_caught(old, new):
    broken = mutant(logprobs, old, new)
    with pytest.raises(CAUGHT):
        prove_gatherer(broken)
