"""What is claimed of each loss: one file per loss, named like its `name`, with an object CLAIMS.

A claims file is paper and pencil: losses computed by hand, and the same loss, its gradient, its metrics and
its optimum written once more in NumPy, sharing nothing with minidpo/losses/. Start with dpo.py. In its
equations `p` holds the numbers of B pairs, NumPy arrays (B,) by the names of PairLogps or Rewards, and `s` is
the loss, read for its settings. checks.py puts every claim to the test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np

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
    # Settings, and world -> log pi (X, Y) of the exact world; or why no optimum is known.
    optimum: tuple[dict, Callable[[Any], Any]] | str = ""
    twin: Equation | None = None  # the losses again, in NumPy
    gradient: Equation | None = None  # the closed form of d loss / d input, by the input's name
    metrics: Equation | None = None  # what is logged, without loss and saturated
    mirror: Equation | None = None  # the loss of the pair with its responses swapped, minus its loss
    # A sentence -> settings, and p -> new values of some fields, which change no loss.
    unmoved: Mapping[str, tuple[dict, Callable[[Pairs], dict]]] = field(default_factory=dict)
    # Settings at which learning raises every chosen response and lowers every rejected one.
    direction: dict | None = None
    independent: bool = True  # whether the loss of a pair is the same in every batch
    fields: type = PairLogps  # or Rewards

    @property
    def names(self) -> tuple[str, ...]:
        """Of the fields that a loss may read."""
        return self.fields._fields  # type: ignore[attr-defined]


def claims_of(loss: Any) -> Claims:
    """The claims of one of our losses, an object or a class: those in claims/NAME.py."""
    return import_module(f"{__name__}.{loss.name.replace(' ', '_')}").CLAIMS


def every_loss() -> dict[str, Any]:
    """All losses of which something is claimed: name -> class."""
    return {
        name.replace(" ", "_"): loss for name, loss in (LOSSES | {BradleyTerry.name: BradleyTerry}).items()
    }


# --- what the claims are made of ----------------------------------------------------------------------------


def sigma(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def logistic_loss(z: np.ndarray, e: float = 0.0) -> np.ndarray:
    """-(1-e) log sigma(z) - e log sigma(-z), where -log sigma(z) = ln(1 + exp(-z))."""
    return (1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)


def log_ratios(p: Pairs, per_token: bool = False) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    return (chosen / p.chosen_length, rejected / p.rejected_length) if per_token else (chosen, rejected)


def rewards(p: Pairs, s: Any, per_token: bool = False) -> list[np.ndarray]:
    """beta times the log-ratios, of chosen and rejected."""
    return [s.beta * ratio for ratio in log_ratios(p, per_token)]


def margin(p: Pairs, s: Any, per_token: bool = False) -> np.ndarray:
    chosen, rejected = rewards(p, s, per_token)
    return chosen - rejected


def of_log_ratios(p: Pairs, slope: np.ndarray, per_token: bool = False) -> dict[str, np.ndarray]:
    """The gradient of a loss of the difference of log-ratios, where `slope` is d loss / d difference."""
    chosen, rejected = (slope / p.chosen_length, slope / p.rejected_length) if per_token else (slope, slope)
    return dict(chosen=chosen, rejected=-rejected, ref_chosen=-chosen, ref_rejected=rejected)


def with_sft(claims: Claims) -> Claims:
    """The claims of a loss of pairs, which has an SFT term: sft_weight times -log pi(y_w|x) / |y_w| is
    added."""
    twin, gradient, metrics, mirror = claims.twin, claims.gradient, claims.metrics, claims.mirror
    assert twin and gradient and metrics and mirror, "all four are claimed of a loss of pairs"

    def per_token(p: Pairs, response: str) -> np.ndarray:
        return -getattr(p, response) / getattr(p, f"{response}_length")

    def with_term(p: Pairs, s: Any) -> dict[str, np.ndarray]:
        of_preference = gradient(p, s)
        return of_preference | {"chosen": of_preference["chosen"] - s.sft_weight / p.chosen_length}

    def both_terms(p: Pairs, s: Any) -> dict[str, np.ndarray]:
        terms = {"preference_loss": twin(p, s), "sft_loss": per_token(p, "chosen")}
        return metrics(p, s) | (terms if s.sft_weight else {})

    return replace(
        claims,
        twin=lambda p, s: twin(p, s) + s.sft_weight * per_token(p, "chosen"),
        gradient=with_term,
        metrics=both_terms,
        mirror=lambda p, s: mirror(p, s) + s.sft_weight * (per_token(p, "rejected") - per_token(p, "chosen")),
    )


def shifted(*names: str) -> Callable[[Pairs], dict]:
    """The same number is added to each of these fields."""
    return lambda p: {name: getattr(p, name) + 8.0 for name in names}


def repeated(p: Pairs) -> dict[str, np.ndarray]:
    """Both responses are said three times over: sums and lengths grow alike."""
    return {name: 3 * getattr(p, name) for name in (*LOGPS, "chosen_length", "rejected_length")}


# Only the difference of two log-ratios matters.
OF_THE_DIFFERENCE: dict[str, tuple[dict, Callable]] = {
    f"the same number added to {' and '.join(names)}": ({}, shifted(*names))
    for names in (LOGPS[::2], LOGPS[1::2], LOGPS[:2], LOGPS[2:])
}


def pair_metrics(p: Pairs, chosen_reward: np.ndarray, rejected_reward: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": chosen_reward > rejected_reward,
        "logps/chosen": p.chosen,
        "logps/rejected": p.rejected,
        "response_length/chosen": p.chosen_length,
        "response_length/rejected": p.rejected_length,
    }
