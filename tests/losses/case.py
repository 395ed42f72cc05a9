"""A loss described for the battery: values computed by hand, and the equations that it is claimed to have.

Dimensions: B pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.losses import PairLogps

# Tensors this small run many times faster on one thread than on two that share busy cores.
torch.set_num_threads(1)

Arrays = dict[str, np.ndarray]  # fields of PairLogps or Rewards, (B,) each
Change = Callable[[Arrays, float], Arrays]
Equation = Callable[[SimpleNamespace, Any], Any]  # of the pairs and of the settings: see equations.py


@dataclass(frozen=True)
class Point:
    """One pair whose loss was computed by hand. What `settings` leaves out has the loss's default."""

    pair: dict[str, float]
    loss: float
    rewards: tuple[float, float] | None = None  # chosen, rejected
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimum:
    """Where a loss leads in the exact world, derived on paper."""

    loss: Any  # with settings under which there is something to learn
    policy: Callable[[Any], Tensor]  # world -> log pi (X, Y)


@dataclass(frozen=True)
class Case:
    """What is claimed of a loss. The loss and its points are needed; what else is absent is not asked."""

    loss: Any
    points: tuple[Point, ...]
    optimum: Optimum | str = ""  # or the reason why none is known
    twin: Equation | None = None  # the losses again, in NumPy
    gradient: Equation | None = None  # the closed form, input by input
    metrics: Equation | None = None
    unmoved_by: tuple[Change, ...] = ()  # changes that leave every loss as it is, by any amount
    mirror: Equation | None = None  # loss(pair) - loss(swapped pair)
    extreme: float = 1e5  # the largest log-prob at which the loss must be finite
    nearest: float = 0.0  # the smallest -log-prob at which it must be finite; 0 is p = 1
    of: type = PairLogps  # or Rewards
    inputs: tuple[str, ...] = ()  # the fields that gradients flow into; left out: those that the class says
    label: str = ""

    def __post_init__(self) -> None:
        if not self.inputs:
            names = ("chosen", "rejected")[: self.loss.responses]
            reference = tuple("ref_" + name for name in names if self.loss.needs_reference)
            object.__setattr__(self, "inputs", names + reference)

    def __str__(self) -> str:
        return self.label or self.loss.name

    def with_settings(self, **settings: Any) -> "Case":
        return replace(self, loss=replace(self.loss, **settings))

    @property
    def numbers(self) -> dict[str, float]:
        """The settings that are numbers."""
        values = {key.name: getattr(self.loss, key.name) for key in fields(self.loss)}
        return {name: value for name, value in values.items() if isinstance(value, float)}

    def draw(self, pairs: int, seed: int = 0) -> Arrays:
        """Ordinary pairs: log-probs in [-40, 0], rewards and margins around 0, lengths from 1 to 30."""
        rng = np.random.default_rng(seed)
        drawn = {name: self.from_unit(name, rng.random(pairs), 40.0) for name in self.inputs}
        return drawn | {name: rng.integers(1, 31, pairs) for name in self.lengths}

    @property
    def lengths(self) -> tuple[str, ...]:
        return tuple(name for name in ("chosen_length", "rejected_length") if name in self.of._fields)

    def from_unit(self, name: str, unit: np.ndarray, scale: float) -> np.ndarray:
        """Numbers in [0, 1] to values of an input: log-probs in [-scale, 0], others in +-scale/8."""
        is_logp = name.endswith("_logps") or (self.of is PairLogps and name not in ("margin", "z0"))
        return -scale * unit if is_logp else scale / 4 * (unit - 0.5)

    def pairs(self, arrays: Arrays, dtype: torch.dtype = torch.float64) -> Any:
        """The same as PairLogps or Rewards, whose inputs have `dtype` and want gradients."""
        tensors = {n: torch.tensor(arrays[n], dtype=dtype, requires_grad=True) for n in self.inputs}
        return self.of(**tensors, **{n: torch.tensor(arrays[n]) for n in self.lengths if n in arrays})

    def losses(self, pairs: Any) -> Tensor:
        losses = self.loss(pairs)
        assert losses.shape == pairs.chosen.shape, f"not one loss per pair: {tuple(losses.shape)}"
        assert losses.dtype == pairs.chosen.dtype, f"{losses.dtype} from {pairs.chosen.dtype}"
        return losses

    def gradients(self, pairs: Any, losses: Tensor) -> Arrays:
        assert losses.requires_grad, "the loss is cut off from its inputs"
        inputs = [getattr(pairs, name) for name in self.inputs]
        found = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        for name, gradient in zip(self.inputs, found, strict=True):
            assert gradient is not None, f"the loss is cut off from {name}"
        return {name: g.double().numpy() for name, g in zip(self.inputs, found, strict=True)}

    def written(self, equation: Equation, arrays: Arrays) -> Any:
        """What an equation of equations.py says of these pairs under this loss's settings."""
        return equation(SimpleNamespace(**arrays), self.loss)


def swapped(arrays: Arrays) -> Arrays:
    """The pairs the other way round: chosen and rejected change places, margins of the data their sign."""

    def other(name: str) -> str:
        return name.replace("chosen", "rejected") if "chosen" in name else name.replace("rejected", "chosen")

    return {other(name): -values if name == "margin" else values for name, values in arrays.items()}


def close(found: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-12, claim: str = "") -> None:
    found = found.detach().double().numpy() if isinstance(found, Tensor) else found
    expected = expected.detach().numpy() if isinstance(expected, Tensor) else expected
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=claim)
