"""What the checks are made of: random pairs, their losses and gradients, and the comparison of numbers."""

from dataclasses import fields, replace
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.losses import Rewards
from minidpo.settings import fault
from minidpo.verify.claims import LOGPS, Claims


class Refuted(AssertionError):
    """A claim is false: the first counterexample in words, and the pair at which it was found."""

    def __init__(self, says: str, pair: dict[str, float] | None = None) -> None:
        super().__init__(says)
        self.says, self.pair = says, pair or {}


class NotAsked(Exception):
    """Nothing of this kind is claimed of the loss."""


def draw(claims: Claims, pairs: int, seed: int = 0, scale: float = 40.0) -> Pairs:
    """Random pairs: log-probs in [-scale, 0], rewards and margins in +-scale/8, lengths from 1 to 300."""
    rng = np.random.default_rng(seed)
    p: dict[str, np.ndarray] = {n: rng.uniform(-scale, 0, pairs) for n in (*LOGPS, "chosen_logps")}
    if issubclass(claims.fields, Rewards):
        p |= {name: rng.uniform(-scale / 8, scale / 8, pairs) for name in ("chosen", "rejected")}
    p |= {name: rng.integers(1, 301, pairs) for name in ("chosen_length", "rejected_length")}
    p |= {"margin": rng.uniform(-scale / 8, scale / 8, pairs), "z0": rng.uniform(0, scale / 8, pairs)}
    p["label"] = rng.integers(0, 2, pairs).astype(bool)
    return Pairs(**{name: p[name] for name in claims.names if name in p})


def tensors(claims: Claims, p: Pairs, dtype: torch.dtype = torch.float64) -> Any:
    """The pairs as PairLogps or Rewards; all but lengths and labels have `dtype` and require gradients."""
    whole = {name: torch.tensor(x) for name, x in vars(p).items() if x.dtype != float}
    inputs = {name: torch.tensor(x, dtype=dtype) for name, x in vars(p).items() if name not in whole}
    return claims.fields(**{name: x.requires_grad_() for name, x in inputs.items()}, **whole)


def swapped(p: Pairs) -> Pairs:
    """The pairs with their two responses exchanged."""

    def partner(name: str) -> str:
        chosen = "chosen" in name
        return name.replace("chosen", "rejected") if chosen else name.replace("rejected", "chosen")

    return Pairs(**{name: vars(p).get(partner(name), values) for name, values in vars(p).items()})


def evaluate(loss: Any, pairs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and d loss / d input by the input's name."""
    losses = loss(pairs)
    if losses.shape != pairs.chosen.shape or losses.dtype != pairs.chosen.dtype:
        raise Refuted(
            f"{shown(loss)}: it returns {losses.dtype} {tuple(losses.shape)}, not one loss per pair in the"
            f" dtype of the log-probs, {pairs.chosen.dtype} {tuple(pairs.chosen.shape)}"
        )
    if not losses.requires_grad:
        raise Refuted(f"{shown(loss)}: the loss is cut off from its inputs: nothing can be learned")
    inputs = {name: x for name, x in pairs._asdict().items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(losses.sum(), list(inputs.values()), materialize_grads=True)
    return losses, dict(zip(inputs, gradients, strict=True))


def compare(
    found: Any, expected: Any, p: Pairs, rtol: float = 1e-12, atol: Any = 1e-12, says: str = ""
) -> float:
    """The greatest difference, relative to what is expected where that is above 1. Raises `Refuted` with the
    first pair of `p` where it is not within the tolerances."""
    found, expected = (
        (x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x, dtype=float)).flatten()
        for x in (found, expected)
    )
    if found.shape != expected.shape:
        raise Refuted(f"{says} has {found.size} values, not one for each of {expected.size} pairs")
    difference = np.abs(found - expected)
    wrong = ~(difference <= atol + rtol * np.abs(expected))  # NaN is wrong too
    if wrong.any():
        i = int(wrong.argmax())
        says = f"{says} is {found[i]:.10g} and not {expected[i]:.10g}"
        raise Refuted(says, {name: values[i] for name, values in vars(p).items()})
    return float((difference / np.maximum(1, np.abs(expected))).max())


def require_finite(values: Tensor, p: Pairs, says: str) -> None:
    if len(places := (~values.isfinite()).nonzero()):
        i = int(places[0])
        raise Refuted(f"{says} is {values[i].item()}", {name: x[i] for name, x in vars(p).items()})


# --- the loss at other settings -----------------------------------------------------------------------------


def with_settings(loss: Any, settings: dict) -> Any:
    """The loss with these settings and defaults else; None where it cannot be so set."""
    try:
        return type(loss)(**settings)
    except NotAsked:
        return None


def with_numbers(loss: Any, factor: float) -> Any:
    """The loss with each nonzero number of its settings changed, so that a loss which ignores one is found
    out. A number that cannot be set, or not so, stays."""
    changed = {}
    for key in fields(loss):
        value, can_be_set = getattr(loss, key.name), key.name in getattr(loss, "parameters", {key.name})
        if isinstance(value, float) and can_be_set and not fault(key, factor * value):
            changed[key.name] = factor * value
    return replace(loss, **changed)


def shown(loss: Any) -> str:
    """Its name and the settings that are not at their default."""
    changed = {f.name: getattr(loss, f.name) for f in fields(loss) if getattr(loss, f.name) != f.default}
    return f"{type(loss).__name__}({', '.join(f'{name}={value:.6g}' for name, value in changed.items())})"
