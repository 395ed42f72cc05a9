"""The losses as the papers state them, in NumPy: twins, closed-form gradients, and what must not matter.

`a` holds the arguments of a call as attributes; lengths that were not given read as 1.
"""

from types import SimpleNamespace

import numpy as np

REWARDS = ("chosen_rewards", "rejected_rewards")
POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")
LENGTHS = ("chosen_lengths", "rejected_lengths")


def log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -z)


def logistic(z: np.ndarray, e: float) -> np.ndarray:
    """-(1-e) log sigma(z) - e log sigma(-z)"""
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def logistic_slope(z: np.ndarray, e: float) -> np.ndarray:
    """d/dz log sigma(z) = sigma(-z), so d/dz of the above = -(1-e) sigma(-z) + e sigma(z)"""
    return -(1 - e) * np.exp(log_sigmoid(-z)) + e * np.exp(log_sigmoid(z))


# --- each loss: its z, and d loss / d argument = slope(z) * dz / d argument ---------------------------------


def bradley_terry_z(a: SimpleNamespace) -> np.ndarray:
    return a.chosen_rewards - a.rejected_rewards - getattr(a, "margin", 0.0)


def bradley_terry_gradient(a: SimpleNamespace) -> dict[str, np.ndarray]:
    slope = logistic_slope(bradley_terry_z(a), a.label_smoothing)
    gradient = {"chosen_rewards": slope, "rejected_rewards": -slope}
    return gradient | ({"margin": -slope} if isinstance(getattr(a, "margin", None), np.ndarray) else {})


def center_gradient(a: SimpleNamespace) -> dict[str, np.ndarray]:
    # (u + v)^2 has derivative 2 (u + v) in both.
    return dict.fromkeys(REWARDS, 2 * (a.chosen_rewards + a.rejected_rewards))


def logratio_rewards(a: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    chosen = (a.policy_chosen_logps - a.reference_chosen_logps) / a.chosen_lengths
    rejected = (a.policy_rejected_logps - a.reference_rejected_logps) / a.rejected_lengths
    return a.beta * chosen, a.beta * rejected


def dpo_z(a: SimpleNamespace) -> np.ndarray:
    chosen, rejected = logratio_rewards(a)
    return chosen - rejected


def dpo_gradient(a: SimpleNamespace) -> dict[str, np.ndarray]:
    slope = logistic_slope(dpo_z(a), a.label_smoothing)
    return {
        "policy_chosen_logps": slope * a.beta / a.chosen_lengths,
        "policy_rejected_logps": -slope * a.beta / a.rejected_lengths,
        "reference_chosen_logps": -slope * a.beta / a.chosen_lengths,
        "reference_rejected_logps": slope * a.beta / a.rejected_lengths,
    }


def ipo_distance(a: SimpleNamespace) -> np.ndarray:
    """h - 1 / (2 tau)"""
    chosen = (a.policy_chosen_logps - a.reference_chosen_logps) / a.chosen_lengths
    rejected = (a.policy_rejected_logps - a.reference_rejected_logps) / a.rejected_lengths
    return chosen - rejected - 0.5 / a.beta


def ipo_gradient(a: SimpleNamespace) -> dict[str, np.ndarray]:
    slope = 2 * ipo_distance(a)
    return {
        "policy_chosen_logps": slope / a.chosen_lengths,
        "policy_rejected_logps": -slope / a.rejected_lengths,
        "reference_chosen_logps": -slope / a.chosen_lengths,
        "reference_rejected_logps": slope / a.rejected_lengths,
    }


def simpo_rewards(a: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    return (
        a.beta * a.policy_chosen_logps / a.chosen_lengths,
        a.beta * a.policy_rejected_logps / a.rejected_lengths,
    )


def simpo_z(a: SimpleNamespace) -> np.ndarray:
    chosen, rejected = simpo_rewards(a)
    return chosen - rejected - a.gamma


def simpo_gradient(a: SimpleNamespace) -> dict[str, np.ndarray]:
    slope = logistic_slope(simpo_z(a), a.label_smoothing)
    return {
        "policy_chosen_logps": slope * a.beta / a.chosen_lengths,
        "policy_rejected_logps": -slope * a.beta / a.rejected_lengths,
    }


# --- swapping the pair: log sigma(z) - log sigma(-z) = z, so loss(z) - loss(-z) = -(1 - 2e) z ---------------


def bradley_terry_mirror(a: SimpleNamespace) -> np.ndarray:
    return -(1 - 2 * a.label_smoothing) * bradley_terry_z(a)


def dpo_mirror(a: SimpleNamespace) -> np.ndarray:
    return -(1 - 2 * a.label_smoothing) * dpo_z(a)


def simpo_mirror(a: SimpleNamespace) -> np.ndarray:
    return -(1 - 2 * a.label_smoothing) * simpo_z(a)


def ipo_mirror(a: SimpleNamespace) -> np.ndarray:
    """(h - t)^2 - (-h - t)^2 = -4 h t, with t = 1 / (2 beta)"""
    return -4 * (ipo_distance(a) + 0.5 / a.beta) * 0.5 / a.beta


# --- changes that must not matter ---------------------------------------------------------------------------


def adding(*names: str):
    """The same number added to each."""
    return lambda arguments, c: arguments | {name: arguments[name] + c for name in names}


def adding_per_token(*names: str):
    """c nats added to every token of each response, so c |y| to its sum."""
    return lambda v, c: v | {name: v[name] + c * v[f"{side_of(name)}_lengths"] for name in names}


def moving_apart(name: str, other: str):
    """c added to one and taken from the other."""
    return lambda arguments, c: arguments | {name: arguments[name] + c, other: arguments[other] - c}


def repeating(*names: str):
    """Each response said three times over: its sum and its length grow alike, whatever c."""
    return lambda v, c: v | {n: 3 * v[n] for n in names} | {n: 3 * v[n] for n in LENGTHS}


def side_of(name: str) -> str:
    return "chosen" if "chosen" in name else "rejected"


SUM_SHIFTS = (
    adding("policy_chosen_logps", "reference_chosen_logps"),
    adding("policy_rejected_logps", "reference_rejected_logps"),
    adding(*POLICY),  # a constant added to both log-ratios
    adding(*REFERENCE),
)
AVERAGE_SHIFTS = (*SUM_SHIFTS[:2], adding_per_token(*POLICY), repeating(*POLICY, *REFERENCE))
