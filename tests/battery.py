"""The battery: what is asked of every loss, as plain functions.

Describe a loss once as a `Loss`; `LOSS_CHECKS` then prove or refute it. tests/loss_table.py lists the
project's own (add a line there), tests/test_own_loss.py shows a loss from outside, tests/test_mutations.py
hands in broken copies of the code and wants every one refuted. A failed claim is an AssertionError.
Dimensions: B pairs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

# Tensors this small run many times faster on one thread than on two that share busy cores.
torch.set_num_threads(1)

Arguments = dict[str, np.ndarray | float]  # what a loss is called with, by name: (B,) arrays and settings
Equation = Callable[[SimpleNamespace], np.ndarray]  # the same, as attributes; absent lengths read as 1
Change = Callable[[Arguments, float], Arguments]  # other arguments, by the amount given


@dataclass(frozen=True)
class Point:
    """One pair whose loss was computed by hand; what it leaves out takes the function's default."""

    arguments: dict[str, float]
    loss: float
    rewards: tuple[float, float] | None = None  # chosen, rejected


@dataclass(frozen=True)
class Loss:
    """What the battery knows of a loss. Three fields are needed; of the rest, what is absent is not asked."""

    name: str
    function: Callable  # takes the arguments by name; returns losses (B,) or a PreferenceLoss
    inputs: tuple[str, ...]  # arguments that gradients flow into, (B,) each; names in _logps are <= 0
    lengths: tuple[str, ...] = ()  # arguments that count tokens
    settings: dict[str, float] = field(default_factory=dict)  # arguments that are one number for the batch
    twin: Equation | None = None  # the losses again, in NumPy
    gradient: Callable[[SimpleNamespace], dict[str, np.ndarray]] | None = None  # closed form, input by input
    rewards: Callable[[SimpleNamespace], tuple[np.ndarray, np.ndarray]] | None = None  # chosen, rejected
    points: tuple[Point, ...] = ()
    unmoved_by: tuple[Change, ...] = ()  # what leaves every loss as it is, by any amount
    mirror: Equation | None = None  # loss(pair) - loss(swapped pair): see swapped()
    extreme: float = (
        1e5  # the largest log-prob at which it must be finite; less for a loss that grows like exp(-z)
    )

    def __str__(self) -> str:
        return self.name

    def draw(self, pairs: int, seed: int = 0) -> Arguments:
        """Ordinary arguments: log-probs in [-40, 0], rewards and margins around 0, lengths 1 to 30."""
        rng = np.random.default_rng(seed)
        drawn: Arguments = {name: from_unit(name, rng.random(pairs), 40.0) for name in self.inputs}
        drawn |= {name: rng.integers(1, 31, pairs) for name in self.lengths}
        return drawn | self.settings

    def tensors(self, arguments: Arguments, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | float]:
        """The same for torch: inputs of `dtype` that want gradients, lengths int64, settings as they are."""
        made: dict[str, Tensor | float] = dict(arguments)
        made |= {n: torch.tensor(arguments[n], dtype=dtype, requires_grad=True) for n in self.inputs}
        return made | {n: torch.tensor(arguments[n]) for n in self.lengths}

    def losses(self, tensors: dict[str, Tensor | float]) -> Tensor:
        out = self.function(**tensors)
        losses = out if isinstance(out, Tensor) else out.losses
        first = tensors[self.inputs[0]]
        assert losses.shape == first.shape, (
            f"one loss a pair: {tuple(first.shape)}, not {tuple(losses.shape)}"
        )
        assert first.dtype != torch.float64 or losses.dtype == torch.float64, "float64 must stay float64"
        return losses

    def gradients(self, tensors: dict[str, Tensor | float], losses: Tensor) -> dict[str, np.ndarray]:
        assert losses.requires_grad, "the loss is cut off from its inputs"
        found = torch.autograd.grad(losses.sum(), [tensors[n] for n in self.inputs], allow_unused=True)
        assert all(g is not None for g in found), "the loss is cut off from one of its inputs"
        return {name: g.double().numpy() for name, g in zip(self.inputs, found, strict=True)}


def from_unit(name: str, unit: np.ndarray, scale: float) -> np.ndarray:
    """Numbers in [0, 1] to values an argument can take: log-probs in [-scale, 0], others in +-scale/8."""
    return -scale * unit if name.endswith("_logps") else scale / 4 * (unit - 0.5)


def swapped(arguments: Arguments) -> Arguments:
    """The pair the other way round: chosen and rejected change places, margin and gamma their sign."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    out: Arguments = {}
    for name, value in arguments.items():
        side = next((side for side in other if side in name), "")
        out[name.replace(side, other.get(side, ""))] = -value if name in ("margin", "gamma") else value
    return out


def close(found, expected, rtol: float = 1e-12, atol: float = 1e-12, claim: str = "") -> None:
    found = found.detach().double().numpy() if isinstance(found, Tensor) else found
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=claim)


def other_settings(arguments: Arguments, loss: Loss) -> Arguments:
    """Each setting at 0.6 of its value: who ignores one is found out."""
    return arguments | {name: 0.6 * value for name, value in loss.settings.items()}


def namespace(arguments: Arguments) -> SimpleNamespace:
    return SimpleNamespace(**({"chosen_lengths": 1, "rejected_lengths": 1} | arguments))


# --- what is asked of a loss --------------------------------------------------------------------------------


def check_points(loss: Loss) -> None:
    """Hand-computed values, to the ten decimals written beside them; the defaults are part of the claim."""
    for point in loss.points:
        one = {n: np.array([v]) if n in loss.inputs + loss.lengths else v for n, v in point.arguments.items()}
        close(loss.losses(loss.tensors(one)), [point.loss], rtol=0, atol=1e-9, claim="hand-computed loss")
        if point.rewards:
            rewards = torch.cat(loss.function(**loss.tensors(one))[1:])
            close(rewards, point.rewards, rtol=0, atol=1e-9, claim="hand-computed rewards")


def check_twin(loss: Loss, arguments: Arguments | None = None) -> None:
    """Losses, and rewards where there are any, equal the NumPy twin's; rewards carry no gradient."""
    if arguments is None:
        for each in (loss.draw(64), other_settings(loss.draw(64), loss)):
            check_twin(loss, each)
        return
    out = loss.function(**loss.tensors(arguments))
    if loss.twin:
        found = loss.losses(loss.tensors(arguments))
        assert found.shape == arguments[loss.inputs[0]].shape, "one loss a pair"
        close(found, loss.twin(namespace(arguments)), atol=1e-11, claim="NumPy twin")
    if loss.rewards:
        for found, expected in zip(out[1:], loss.rewards(namespace(arguments)), strict=True):
            assert not found.requires_grad, "rewards are detached"
            close(found, expected, claim="rewards")


def check_closed_form(loss: Loss) -> None:
    """d loss / d argument, for each argument, as written out in closed form."""
    for arguments in (loss.draw(64, seed=1), other_settings(loss.draw(64, seed=1), loss)):
        tensors = loss.tensors(arguments)
        gradients = loss.gradients(tensors, loss.losses(tensors))
        for name, expected in (loss.gradient(namespace(arguments)) if loss.gradient else {}).items():
            close(gradients[name], expected, claim=f"d loss / d {name}")


def check_derivatives(loss: Loss) -> None:
    """First and second derivatives equal finite differences in float64, on pairs of which some have a gradient."""
    arguments = loss.draw(6, seed=2)
    tensors = loss.tensors(arguments)
    for name, gradient in loss.gradients(tensors, loss.losses(tensors)).items():
        assert gradient.any(), f"d loss / d {name} is 0 for every pair drawn"

    def of_inputs(*inputs: Tensor) -> Tensor:
        return loss.losses(tensors | dict(zip(loss.inputs, inputs, strict=True)))

    inputs = tuple(tensors[name] for name in loss.inputs)
    assert gradcheck(of_inputs, inputs, raise_exception=False), "gradcheck"
    assert gradgradcheck(of_inputs, inputs, raise_exception=False), "gradgradcheck"


def check_pairs_are_independent(loss: Loss) -> None:
    """A pair's loss is the same alone, in a batch and in any order."""
    arguments = loss.draw(5, seed=3)
    losses = loss.losses(loss.tensors(arguments))
    for order in ([4], [0], [2, 0, 4, 1, 3]):
        part = {n: v[order] if isinstance(v, np.ndarray) else v for n, v in arguments.items()}
        close(loss.losses(loss.tensors(part)), losses.detach()[order].numpy(), rtol=1e-14, atol=0)


def check_invariances(loss: Loss) -> None:
    """What must not matter does not; swapping the pair does exactly what it must."""
    arguments = loss.draw(64, seed=4)
    losses = loss.losses(loss.tensors(arguments)).detach()
    for change, c in itertools.product(loss.unmoved_by, (0.5, -2.0, 8.0)):
        moved = loss.losses(loss.tensors(change(arguments, c)))
        close(moved, losses, rtol=1e-10, atol=1e-10, claim="a change that must not matter")
    if loss.mirror:
        gap = losses - loss.losses(loss.tensors(swapped(arguments))).detach()
        close(gap, loss.mirror(namespace(arguments)), rtol=1e-10, atol=1e-10, claim="swapped pair")
    if loss.rewards:
        out = loss.function(**loss.tensors(arguments))
        back = loss.function(**loss.tensors(swapped(arguments)))
        close(
            out[1] - out[2], (back[2] - back[1]).detach(), claim="swapping the pair negates the reward margin"
        )


def check_extremes(loss: Loss) -> None:
    """float32 at log-probs down to -`extreme`, rewards and margins of +-a tenth: finite, and as in float64 and the twin."""
    far = loss.extreme
    grid = [
        (0.0, -far / 10, -far) if name.endswith("_logps") else (-far / 10, 0.0, far / 10)
        for name in loss.inputs
    ]
    columns = np.array(list(itertools.product(*grid))).T  # (inputs, B)
    arguments: Arguments = dict(zip(loss.inputs, columns, strict=True)) | loss.settings
    for length in (1, 1000):
        arguments |= {name: np.full(columns.shape[1], length) for name in loss.lengths}
        tensors = loss.tensors(arguments, torch.float32)
        losses = loss.losses(tensors)
        for bad in (~losses.isfinite()).nonzero()[:1, 0].tolist():
            at = {name: float(value[bad]) for name, value in arguments.items() if name in loss.inputs}
            raise AssertionError(f"the loss is {losses[bad].item()} at {at} (`extreme` says how far to ask)")
        for name, gradient in loss.gradients(tensors, losses).items():
            assert np.isfinite(gradient).all(), f"d loss / d {name} is not finite"
        precise = loss.losses(loss.tensors(arguments)).detach()
        close(losses, precise, rtol=1e-5, atol=1e-6, claim="float32")
        if loss.twin:
            close(precise, loss.twin(namespace(arguments)), claim="NumPy twin, far out")


def check_bf16(loss: Loss) -> None:
    """bf16 inputs: computed in float32 on what rounding left of them; the loss moves no more than they did.

    Rounding to bf16 moves an input by at most 2^-8 of itself, and a convex function changes between two
    points by no more than its steeper end's slope times the way, so
    |change| <= 2^-8 sum |input| max |d loss / d input|.
    """
    arguments = loss.draw(64, seed=5)
    full, half = loss.tensors(arguments, torch.float32), loss.tensors(arguments, torch.bfloat16)
    rounded = {n: t.detach().float().requires_grad_() if n in loss.inputs else t for n, t in half.items()}
    in_full, in_half, in_rounded = (loss.losses(t) for t in (full, half, rounded))
    assert in_half.dtype == torch.float32 and torch.equal(in_half, in_rounded), (
        "bf16 must be computed in float32: call .float() on half-precision inputs"
    )
    slopes, slopes_half = loss.gradients(full, in_full), loss.gradients(rounded, in_rounded)
    steepest = {n: np.maximum(abs(slopes[n]), abs(slopes_half[n])) for n in loss.inputs}
    bound = 2.0**-8 * sum(abs(arguments[n]) * steepest[n] for n in loss.inputs) + 1e-5
    assert (abs(in_half - in_full).detach().numpy() <= bound).all(), "bf16 moved the loss too far"


LOSS_CHECKS = (
    check_points,
    check_twin,
    check_closed_form,
    check_invariances,
    check_pairs_are_independent,
    check_extremes,
    check_bf16,
    check_derivatives,
)
