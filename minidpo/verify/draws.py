"""What the checks are made of: random pairs, their losses and gradients, and the comparison of numbers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.errors import UserError, one_line
from minidpo.losses import Rewards
from minidpo.verify.claims import LOGPS, Claims

# F.softplus(z) is z from 20 on, where ln(1 + exp(z)) is 2e-9 more. A length times a number is float32.
CLOSE = "nearly equal: by float32, or by F.softplus, which is linear beyond its threshold of 20?"


class Refuted(AssertionError):
    """A claim is false: the first counterexample, with the numbers of the pair at which it was found."""

    def __init__(self, loss: Any, says: str, p: Pairs | None = None, index: int = 0) -> None:
        pair = vars(p) if p else {}
        read = loss.arguments.values() if hasattr(loss, "arguments") else pair  # of a function its arguments
        at = ", ".join(f"{name} {values[index]:.6g}" for name, values in pair.items() if name in read)
        super().__init__(f"{shown(loss)}: {says}" + (f", at {at}" if at else ""))


class NotAsked(Exception):
    """Nothing of this kind is claimed of the loss."""


def ask(what: str, equation: Callable, *given: Any) -> Any:
    """What an equation of the claims says. If it raises, the claims are wrong, and no loss is refuted."""
    try:
        return equation(*given)
    except Exception as error:
        raise UserError(f"the claims raise {type(error).__name__}: {one_line(error)} (in {what})") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are many times faster on one thread, and their sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def draw(claims: Claims, pairs: int, seed: int = 0, scale: float = 40.0) -> Pairs:
    """Random pairs: log-probs in [-scale, 0], rewards and margins in +-scale/8, lengths from 1 to 300."""
    rng = np.random.default_rng(seed)
    p: dict[str, np.ndarray] = {n: rng.uniform(-scale, 0, pairs) for n in (*LOGPS, "chosen_logps")}
    if issubclass(claims.fields, Rewards):
        p |= {name: rng.uniform(-scale / 8, scale / 8, pairs) for name in ("chosen", "rejected")}
    p |= {name: rng.integers(1, 301, pairs) for name in ("chosen_length", "rejected_length")}
    p |= {"margin": rng.uniform(-scale / 8, scale / 8, pairs), "z0": rng.uniform(0, scale / 8, pairs)}
    p["label"] = rng.integers(0, 2, pairs).astype(bool)
    return Pairs(**{name: p[name] for name in claims.fields._fields if name in p})


def tensors(claims: Claims, p: Pairs, dtype: torch.dtype = torch.float64) -> Any:
    """The pairs as PairLogps or Rewards; all but lengths and labels have `dtype` and require gradients."""
    whole = {name: torch.tensor(x) for name, x in vars(p).items() if x.dtype != float}
    inputs = {name: torch.tensor(x, dtype=dtype) for name, x in vars(p).items() if name not in whole}
    values = {name: x.requires_grad_() for name, x in inputs.items()} | whole
    return claims.fields._make(map(values.get, claims.fields._fields))


def tied(p: Pairs, equal: Any, start: Any) -> Pairs:
    """The pairs; at `equal` both responses are the same, at `start` the policy is the reference."""
    values = {name: x.copy() for name, x in vars(p).items()}
    for name, x in values.items():
        if "rejected" in name:
            x[equal] = values[name.replace("rejected", "chosen")][equal]
        if name.startswith("ref_"):
            x[start] = values[name.removeprefix("ref_")][start]
    return Pairs(**values)


def evaluate(loss: Any, pairs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and d loss / d input by the input's name."""
    given = {name: x.detach().clone() for name, x in pairs._asdict().items() if x is not None}
    losses = loss(pairs)
    if changed := [name for name, x in given.items() if not torch.equal(x, getattr(pairs, name))]:
        raise Refuted(loss, f"it changes its input {changed[0]}")
    if losses.shape != pairs.chosen.shape or losses.dtype != pairs.chosen.dtype:
        found, needed = (f"{x.dtype} {tuple(x.shape)}" for x in (losses, pairs.chosen))
        says = f"it returns {found}, not one loss per pair in the dtype of the log-probs, {needed}"
        raise Refuted(loss, says)
    if not losses.requires_grad:
        raise Refuted(loss, "the loss is cut off from its inputs: nothing can be learned")
    inputs = {name: x for name, x in pairs._asdict().items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(losses.sum(), list(inputs.values()), materialize_grads=True)
    return losses, dict(zip(inputs, gradients, strict=True))


def compare(
    loss: Any, what: str, found: Any, expected: Any, p: Pairs, rtol: float = 1e-12, atol: Any = 1e-12
) -> float:
    """The greatest difference, relative to what is expected where that is above 1. Raises `Refuted` with the
    first pair of `p` where it is not within the tolerances."""
    found, expected = (
        x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=float)
        for x in (found, expected)
    )
    difference = np.abs(found - expected)
    wrong = ~(difference <= atol + rtol * np.abs(expected))  # NaN is wrong too
    if wrong.any():
        close = f" ({CLOSE})" if (difference < 1e-6 * (1 + abs(expected))).all() else ""
        i = int(wrong.argmax())
        raise Refuted(loss, f"{what} is {found[i]:.10g} and not {expected[i]:.10g}{close}", p, i)
    return float((difference / np.maximum(1, np.abs(expected))).max())


def with_settings(loss: Any, settings: dict) -> Any:
    """The loss with these settings and defaults else; None where it cannot be so set."""
    keys = {key.name for key in fields(loss)}
    # What the loss lacks of the one that it claims to be is fixed: it can be asked at this value alone.
    like = getattr(loss, "like", None)
    asked = (vars(type(like)()) if like else {}) | settings
    if any(name not in keys and getattr(loss, name, None) != value for name, value in asked.items()):
        return None
    return type(loss)(**{name: value for name, value in settings.items() if name in keys})


def shown(loss: Any) -> str:
    """Its name and the settings that are not at their default."""
    changed = {f.name: getattr(loss, f.name) for f in fields(loss) if getattr(loss, f.name) != f.default}
    return f"{type(loss).__name__}({', '.join(f'{name}={value:.6g}' for name, value in changed.items())})"
