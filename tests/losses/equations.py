"""The losses as the papers state them, in NumPy: twins, closed-form gradients, and what must not matter.

In every function `p` holds the pairs, with the fields of PairLogps or Rewards as arrays (B,), and `s` the
settings, with the fields of the loss. A gradient has d loss / d input by the name of the input.
"""

from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np

Gradient = dict[str, np.ndarray]


def log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -z)


def logistic(z: np.ndarray, e: float) -> np.ndarray:
    """-(1-e) log sigma(z) - e log sigma(-z)"""
    return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


def logistic_slope(z: np.ndarray, e: float) -> np.ndarray:
    """d/dz log sigma(z) = sigma(-z), so d/dz of the above is -(1-e) sigma(-z) + e sigma(z)."""
    return -(1 - e) * np.exp(log_sigmoid(-z)) + e * np.exp(log_sigmoid(z))


# --- DPO and IPO: functions of h, the difference of log-ratios ----------------------------------------------


def lengths(p: Pairs, s: Any) -> tuple[Any, Any]:
    per_token = getattr(s, "length_normalize", False)
    return (p.chosen_length, p.rejected_length) if per_token else (1, 1)


def log_ratio_rewards(p: Pairs, s: Any) -> tuple[np.ndarray, np.ndarray]:
    n_w, n_l = lengths(p, s)
    return s.beta * (p.chosen - p.ref_chosen) / n_w, s.beta * (p.rejected - p.ref_rejected) / n_l


def dpo_z(p: Pairs, s: Any) -> np.ndarray:
    chosen, rejected = log_ratio_rewards(p, s)
    return chosen - rejected


def ipo_h(p: Pairs, s: Any) -> np.ndarray:
    return dpo_z(p, s) / s.beta


def through_h(p: Pairs, s: Any, slope: np.ndarray) -> Gradient:
    """d loss / d each log-prob, where slope is d loss / d h."""
    n_w, n_l = lengths(p, s)
    policy = {"chosen": slope / n_w, "rejected": -slope / n_l}
    return policy | {"ref_" + name: -gradient for name, gradient in policy.items()}


def dpo(p: Pairs, s: Any) -> np.ndarray:
    return logistic(dpo_z(p, s), s.label_smoothing)


def dpo_gradient(p: Pairs, s: Any) -> Gradient:
    return through_h(p, s, s.beta * logistic_slope(dpo_z(p, s), s.label_smoothing))


def ipo(p: Pairs, s: Any) -> np.ndarray:
    return (ipo_h(p, s) - 1 / (2 * s.beta)) ** 2


def ipo_gradient(p: Pairs, s: Any) -> Gradient:
    return through_h(p, s, 2 * (ipo_h(p, s) - 1 / (2 * s.beta)))


# --- SimPO and SFT: functions of average log-probs ----------------------------------------------------------


def simpo_rewards(p: Pairs, s: Any) -> tuple[np.ndarray, np.ndarray]:
    return s.beta * p.chosen / p.chosen_length, s.beta * p.rejected / p.rejected_length


def simpo_z(p: Pairs, s: Any) -> np.ndarray:
    chosen, rejected = simpo_rewards(p, s)
    return chosen - rejected - s.gamma


def simpo(p: Pairs, s: Any) -> np.ndarray:
    return logistic(simpo_z(p, s), s.label_smoothing)


def simpo_gradient(p: Pairs, s: Any) -> Gradient:
    slope = s.beta * logistic_slope(simpo_z(p, s), s.label_smoothing)
    return {"chosen": slope / p.chosen_length, "rejected": -slope / p.rejected_length}


def sft(p: Pairs, s: Any) -> np.ndarray:
    return -p.chosen / p.chosen_length


def sft_gradient(p: Pairs, s: Any) -> Gradient:
    return {"chosen": -1 / p.chosen_length}


# --- the reward model's loss --------------------------------------------------------------------------------


def bradley_terry_z(p: Pairs, s: Any) -> np.ndarray:
    return p.chosen - p.rejected - s.margin - (p.margin if s.margin_from_data else 0)


def bradley_terry(p: Pairs, s: Any) -> np.ndarray:
    losses = logistic(bradley_terry_z(p, s), s.label_smoothing)
    losses = losses + s.center_weight * (p.chosen + p.rejected) ** 2
    return losses - (s.lm_weight * p.chosen_logps / p.chosen_length if s.lm_weight else 0)


def bradley_terry_gradient(p: Pairs, s: Any) -> Gradient:
    slope = logistic_slope(bradley_terry_z(p, s), s.label_smoothing)
    center = s.center_weight * 2 * (p.chosen + p.rejected)
    gradient = {"chosen": slope + center, "rejected": -slope + center}
    if s.margin_from_data:
        gradient["margin"] = -slope
    if s.lm_weight:
        gradient["chosen_logps"] = -s.lm_weight / p.chosen_length
    return gradient


# --- what is logged -----------------------------------------------------------------------------------------


def pair_metrics(rewards):
    """Every metric of a loss on pairs whose rewards are `rewards(p, s)`, but for the losses themselves."""

    def metrics(p: Pairs, s: Any) -> dict[str, np.ndarray]:
        chosen, rejected = rewards(p, s)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected,
            "logps/chosen": p.chosen,
            "logps/rejected": p.rejected,
            "response_length/chosen": p.chosen_length,
            "response_length/rejected": p.rejected_length,
        }

    return metrics


def reward_metrics(p: Pairs, s: Any) -> dict[str, np.ndarray]:
    metrics = {
        "preference_loss": logistic(bradley_terry_z(p, s), s.label_smoothing),
        "accuracy": p.chosen > p.rejected,
        "margin": p.chosen - p.rejected,
        "mean_reward": (p.chosen + p.rejected) / 2,
    }
    return metrics | ({"lm_loss": -p.chosen_logps / p.chosen_length} if s.lm_weight else {})


# --- swapping the pair, where no margin is demanded: log sigma(z) - log sigma(-z) = z -----------------------


def logistic_mirror(z):
    """loss(z) - loss(-z) = -(1 - 2e) z"""
    return lambda p, s: -(1 - 2 * s.label_smoothing) * z(p, s)


def ipo_mirror(p: Pairs, s: Any) -> np.ndarray:
    """(h - t)^2 - (-h - t)^2 = -4 h t, with t = 1 / (2 beta)"""
    return -4 * ipo_h(p, s) / (2 * s.beta)


# --- changes of the pairs, by any amount c, that must not matter --------------------------------------------


def adding(*names: str):
    """The same number added to each."""
    return lambda p, c: p | {name: p[name] + c for name in names}


def adding_per_token(p: dict, c: float) -> dict:
    """c nats added to every token of each response, so c |y| to its sum."""
    return p | {name: p[name] + c * p[f"{name}_length"] for name in ("chosen", "rejected")}


def repeating(p: dict, c: float) -> dict:
    """Each response said three times over: its sums and its length grow alike, whatever c."""
    return {name: 3 * values for name, values in p.items()}


SUM_SHIFTS = (
    adding("chosen", "ref_chosen"),
    adding("rejected", "ref_rejected"),
    adding("chosen", "rejected"),  # a constant added to both log-ratios
    adding("ref_chosen", "ref_rejected"),
)
AVERAGE_SHIFTS = (*SUM_SHIFTS[:2], adding_per_token, repeating)
