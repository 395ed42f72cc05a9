"""What is claimed of each loss: one file per loss, named like its `name`, with an object CLAIMS.

A claims file is paper and pencil: losses computed by hand, and the same loss, its gradient and its optimum
written once more in NumPy, sharing nothing with minidpo/losses/. Start with dpo.py. In its equations `p`
holds the numbers of B pairs, NumPy arrays (B,) by the names of PairLogps or Rewards, and `s` is the loss,
read for its settings. checks.py puts every claim to the test. The SFT term, which every loss of pairs can
have, is left out of its file: `verify` adds it (`with_sft`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np

from minidpo.errors import UserError
from minidpo.losses import LOSSES, BradleyTerry, PairLogps

LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")
# Two pairs to compute with by hand. The log-ratios of PAIR are -10 + 13 = 3 and -20 + 19 = -1; per token, of
# 4 and 5 tokens, that is 0.75 and -0.2. At the START of training, policy and reference are equal.
PAIR = dict(zip(LOGPS, (-10, -20, -13, -19), strict=True)) | dict(chosen_length=4, rejected_length=5)
START = dict(zip(LOGPS, (-7, -9, -7, -9), strict=True)) | dict(chosen_length=4, rejected_length=5)

Equation = Callable[[Pairs, Any], Any]  # p, s -> an array (B,), or a dict of arrays


@dataclass(frozen=True)
class Claims:
    """What is claimed of a loss. Of ours, points and optimum are needed; what is left out is not asked."""

    # Settings (the others have their defaults), a pair, and its loss computed by hand. Every check is also
    # made at each of these settings.
    points: Sequence[tuple[Any, Any, float]] = ()
    twin: Equation | None = None  # the losses again, in NumPy
    gradient: Equation | None = None  # the closed form of d loss / d input, by the input's name
    mirror: Equation | None = None  # the loss of the pair with its responses swapped, minus its loss
    # A sentence -> new values of some fields of p, which change no loss at the settings of the first point.
    unmoved: Mapping[str, Callable[[Pairs], dict]] = field(default_factory=dict)
    # World, s -> log pi (X, Y), where training in the exact world ends; or why no optimum is known.
    optimum: Callable[[Any, Any], Any] | str = ""
    optima: Mapping[str, dict] = field(default_factory=dict)  # the rows of `exact`: title -> settings
    independent: bool = True  # whether the loss of a pair is the same in every batch
    fields: Any = PairLogps  # or Rewards


def claims_of(loss: Any) -> Claims:
    """The claims of one of our losses, an object or a class: those in claims/NAME.py, or UserError."""
    name = (getattr(loss, "name", "") or type(loss).__name__).replace(" ", "_")
    try:
        return import_module(f"{__name__}.{name}").CLAIMS
    except ModuleNotFoundError:
        needed = f"write minidpo/verify/claims/{name}.py, or give some (claims=, --claims MODULE:NAME)"
        raise UserError(f"no claims for the loss {name!r}: {needed}, or a loss that it is like") from None


def every_loss() -> dict[str, Any]:
    """All losses of which something is claimed: name -> class."""
    return LOSSES | {BradleyTerry.name.replace(" ", "_"): BradleyTerry}


def with_sft(claims: Any) -> Claims:
    """The claims, with sft_weight times -log pi(y_w|x) / |y_w| added."""

    def nll(p: Pairs, response: str = "chosen") -> np.ndarray:
        return -getattr(p, response) / getattr(p, f"{response}_length")

    def gradient(p: Pairs, s: Any) -> dict[str, np.ndarray]:
        of_preference = claims.gradient(p, s)
        return of_preference | {"chosen": of_preference.get("chosen", 0) - s.sft_weight / p.chosen_length}

    def mirror(p: Pairs, s: Any) -> np.ndarray:
        return claims.mirror(p, s) + s.sft_weight * (nll(p, "rejected") - nll(p))

    return replace(
        claims,
        twin=claims.twin and (lambda p, s: claims.twin(p, s) + s.sft_weight * nll(p)),
        gradient=claims.gradient and gradient,
        mirror=claims.mirror and mirror,
    )


# --- what the claims are made of ----------------------------------------------------------------------------


def sigma(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def logistic(z: np.ndarray, e: float = 0.0) -> np.ndarray:
    """-(1-e) log sigma(z) - e log sigma(-z), where -log sigma(z) = ln(1 + exp(-z))."""
    return (1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)


def log_ratios(p: Pairs, per_token: bool = False) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    return (chosen / p.chosen_length, rejected / p.rejected_length) if per_token else (chosen, rejected)


def margin(p: Pairs, per_token: bool = False) -> np.ndarray:
    """h, the difference of the log-ratios."""
    chosen, rejected = log_ratios(p, per_token)
    return chosen - rejected


def of_margin(p: Pairs, slope: np.ndarray, per_token: bool = False) -> dict[str, np.ndarray]:
    """The gradient of a loss of `margin`, where `slope` is d loss / d margin."""
    chosen, rejected = (slope / p.chosen_length, slope / p.rejected_length) if per_token else (slope, slope)
    return dict(chosen=chosen, rejected=-rejected, ref_chosen=-chosen, ref_rejected=rejected)


def shifted(*names: str) -> Callable[[Pairs], dict]:
    """The same number is added to each of these fields."""
    return lambda p: {name: getattr(p, name) + 8.0 for name in names}


def repeated(p: Pairs) -> dict[str, np.ndarray]:
    """Both responses are said three times over: sums and lengths grow alike."""
    return {name: 3 * getattr(p, name) for name in (*LOGPS, "chosen_length", "rejected_length")}


# Each log-prob matters only in comparison with the reference.
OF_LOG_RATIOS = {
    f"the same number added to {' and '.join(names)}": shifted(*names) for names in (LOGPS[::2], LOGPS[1::2])
}
# Besides, only the difference of the two log-ratios matters.
OF_THE_DIFFERENCE = OF_LOG_RATIOS | {
    f"the same number added to {' and '.join(names)}": shifted(*names) for names in (LOGPS[:2], LOGPS[2:])
}
