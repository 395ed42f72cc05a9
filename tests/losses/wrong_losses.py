"""Mistakes that real projects made in these losses. The battery refutes every one: test_wrong_losses.py.

Each group names the case of loss_table.py that is meant, the check that refutes the mistakes, and the method
that has them. It takes the loss `s`, for its settings, and the pairs `p`, like those in minidpo/losses/.
"""

from dataclasses import replace

import torch
from battery import (
    check_bf16,
    check_extremes,
    check_gradient,
    check_independence,
    check_metrics,
    check_points,
    check_refusals,
    check_twin,
)

from minidpo.losses import DPO, IPO, SFT, BradleyTerry, SimPO, logistic


def w(p):
    """The log-ratio of the chosen response."""
    return p.chosen - p.ref_chosen


def l(p):  # noqa: E743
    """The log-ratio of the rejected response."""
    return p.rejected - p.ref_rejected


def of_z(form):
    return lambda s, p: form(s.z(p), s.label_smoothing)


def of_h(form):
    return lambda s, p: form(w(p) - l(p), s.beta)


def of_rewards(form):
    return lambda s, r: form(r.chosen - r.rejected, s.margin, r.margin)


def centred(penalty):
    return lambda s, r: s.preference(r) + s.center_weight * penalty(r.chosen, r.rejected)


def detached(p, *names):
    return p._replace(**{name: getattr(p, name).detach() for name in names})


def metric(name, value):
    """The metrics of a loss with another value of the one called `name`."""
    return lambda s, p, losses: type(s).__base__.metrics(s, p, losses) | {name: value(s, p, losses)}


WRONG_LOSSES = {
    # --- DPO: z ---
    ("dpo", check_points, "z"): {
        "beta dropped": lambda s, p: w(p) - l(p),
        "beta dropped on the rejected response": lambda s, p: s.beta * w(p) - l(p),
        "divided by beta": lambda s, p: (w(p) - l(p)) / s.beta,
        "beta twice": lambda s, p: s.beta**2 * (w(p) - l(p)),
        "sign flipped, or responses swapped": lambda s, p: s.beta * (l(p) - w(p)),
        "sum for difference, or one log-ratio upside down": lambda s, p: s.beta * (w(p) + l(p)),
        "rejected response left out": lambda s, p: s.beta * w(p),
        "policies swapped": lambda s, p: s.beta * (p.rejected - p.ref_chosen - p.chosen + p.ref_rejected),
        "references swapped": lambda s, p: s.beta * (p.chosen - p.ref_rejected - p.rejected + p.ref_chosen),
        "reference ignored": lambda s, p: s.beta * (p.chosen - p.rejected),
        "reference of the rejected response ignored": lambda s, p: s.beta * (w(p) - p.rejected),
        "reference added": lambda s, p: s.beta * (p.chosen + p.ref_chosen - p.rejected - p.ref_rejected),
    },
    ("dpo", check_gradient, "z"): {
        "policy detached": lambda s, p: DPO.z(s, detached(p, "chosen", "rejected")),
        "reference detached": lambda s, p: DPO.z(s, detached(p, "ref_chosen", "ref_rejected")),
        "reference of one response detached": lambda s, p: DPO.z(s, detached(p, "ref_rejected")),
        "everything detached": lambda s, p: DPO.z(s, p).detach(),
    },
    ("dpo", check_independence, "z"): {
        "rejected reward averaged over the batch": lambda s, p: s.beta * (w(p) - l(p).mean()),
        "rejected response of the next pair": lambda s, p: s.beta * (w(p) - l(p).roll(1)),
    },
    ("dpo, per token", check_points, "z"): {
        "sums for averages": lambda s, p: s.beta * (w(p) - l(p)),
        "chosen length for both": lambda s, p: s.beta * (w(p) - l(p)) / p.chosen_length,
        "rejected length for both": lambda s, p: s.beta * (w(p) - l(p)) / p.rejected_length,
        "chosen sum not divided": lambda s, p: s.beta * (w(p) - l(p) / p.rejected_length),
        "rejected sum not divided": lambda s, p: s.beta * (w(p) / p.chosen_length - l(p)),
        "divided twice": lambda s, p: s.beta * (w(p) / p.chosen_length**2 - l(p) / p.rejected_length**2),
        "multiplied": lambda s, p: s.beta * (w(p) * p.chosen_length - l(p) * p.rejected_length),
        "off by one": lambda s, p: s.beta * (w(p) / (p.chosen_length + 1) - l(p) / (p.rejected_length + 1)),
    },
    ("dpo, per token", check_twin, "z"): {
        "the other length": lambda s, p: s.beta * (w(p) / p.rejected_length - l(p) / p.chosen_length),
        "padded length": lambda s, p: (
            s.beta * (w(p) / p.chosen_length.max() - l(p) / p.rejected_length.max())
        ),
        "mean length of the batch": lambda s, p: s.beta * (w(p) - l(p)) / p.chosen_length.double().mean(),
    },
    # --- DPO: what becomes of z ---
    ("dpo", check_points, "__call__"): {
        "likelihood minimised": of_z(lambda z, e: -logistic(z)),
        "sigmoid without its log": of_z(lambda z, e: -torch.sigmoid(z)),
        "hinge for sigmoid": of_z(lambda z, e: torch.relu(1 - z)),
        "summed over the batch": of_z(lambda z, e: logistic(z).sum()),
        "averaged over the batch": of_z(lambda z, e: logistic(z).mean()),
    },
    ("dpo", check_independence, "__call__"): {
        "divided by the size of the batch": of_z(lambda z, e: logistic(z) / len(z)),
        "every pair the batch's mean": of_z(lambda z, e: logistic(z).mean().expand(len(z))),
    },
    ("dpo", check_extremes, "__call__"): {
        "log of sigmoid, which is -inf far out": of_z(lambda z, e: -torch.sigmoid(z).log()),
        "log of 1 + exp, which overflows": of_z(lambda z, e: (1 + torch.exp(-z)).log()),
    },
    ("dpo", check_twin, "__call__"): {
        "float64 computed in float32": of_z(lambda z, e: logistic(z).float()),
        "float32 called float64": of_z(lambda z, e: logistic(z.float()).to(z.dtype)),
        "log-sigmoid in half precision": of_z(lambda z, e: logistic(z.bfloat16()).to(z.dtype)),
    },
    ("dpo", check_bf16, "__call__"): {
        "half precision in, half precision out": of_z(lambda z, e: logistic(z).bfloat16()),
    },
    ("dpo, smoothed", check_points, "__call__"): {
        "smoothing ignored": of_z(lambda z, e: logistic(z)),
        "smoothing halved": of_z(lambda z, e: logistic(z, e / 2)),
        "robust for conservative": of_z(
            lambda z, e: ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)
        ),
        "the robust loss's sign": of_z(lambda z, e: (1 - e) * logistic(z) - e * logistic(-z)),
        "1 - e dropped": of_z(lambda z, e: logistic(z) + e * logistic(-z)),
        "1 + e for 1 - e": of_z(lambda z, e: (1 + e) * logistic(z) + e * logistic(-z)),
        "e and 1 - e exchanged": of_z(lambda z, e: logistic(-z, e)),
    },
    # --- IPO ---
    ("ipo", check_points, "__call__"): {
        "target 1/beta": of_h(lambda h, beta: (h - 1 / beta) ** 2),
        "target beta/2": of_h(lambda h, beta: (h - beta / 2) ** 2),
        "target of the other sign, or responses swapped": of_h(lambda h, beta: (h + 1 / (2 * beta)) ** 2),
        "no target": of_h(lambda h, beta: h**2),
        "beta inside h": of_h(lambda h, beta: (beta * h - 1 / (2 * beta)) ** 2),
        "scaled by beta squared": of_h(lambda h, beta: (beta * h - 1 / 2) ** 2),
        "absolute distance": of_h(lambda h, beta: (h - 1 / (2 * beta)).abs()),
        "half the square": of_h(lambda h, beta: (h - 1 / (2 * beta)) ** 2 / 2),
        "per token by mistake": lambda s, p: IPO.__call__(replace(s, length_normalize=True), p),
        "rejected response left out": lambda s, p: (w(p) - 1 / (2 * s.beta)) ** 2,
    },
    ("ipo", check_twin, "__call__"): {
        "only below the target": of_h(lambda h, beta: (h - 1 / (2 * beta)).clamp(max=0) ** 2),
    },
    # --- SimPO ---
    ("simpo", check_points, "z"): {
        "gamma ignored": lambda s, p: SimPO.z(s, p) + s.gamma,
        "gamma added": lambda s, p: SimPO.z(s, p) + 2 * s.gamma,
        "gamma subtracted twice": lambda s, p: SimPO.z(s, p) - s.gamma,
        "gamma inside beta": lambda s, p: SimPO.z(s, p) + s.gamma - s.beta * s.gamma,
        "responses swapped": lambda s, p: s.rewards(p)[1] - s.rewards(p)[0] - s.gamma,
        "beta dropped": lambda s, p: (s.rewards(p)[0] - s.rewards(p)[1]) / s.beta - s.gamma,
        "beta on the chosen response alone": lambda s, p: s.rewards(p)[0] - p.mean_logps()[1] - s.gamma,
        "sums for averages": lambda s, p: s.beta * (p.chosen - p.rejected) - s.gamma,
        "one length": lambda s, p: s.beta * (p.chosen - p.rejected) / p.chosen_length - s.gamma,
        "one response": lambda s, p: (
            s.beta * p.chosen * (1 / p.chosen_length - 1 / p.rejected_length) - s.gamma
        ),
    },
    ("simpo, smoothed", check_points, "__call__"): {"smoothing ignored": of_z(lambda z, e: logistic(z))},
    # --- SFT ---
    ("sft", check_points, "__call__"): {
        "likelihood minimised": lambda s, p: -SFT.__call__(s, p),
        "sum for mean": lambda s, p: -p.chosen,
        "token count subtracted": lambda s, p: -(p.chosen - p.chosen_length),
        "length off by one": lambda s, p: -p.chosen / (p.chosen_length + 1),
    },
    ("sft", check_independence, "__call__"): {
        "mean over the batch's tokens": lambda s, p: -p.chosen * len(p.chosen) / p.chosen_length.sum(),
    },
    # --- the reward model: difference of rewards d, margin of the settings m, of the data n ---
    ("rm", check_points, "preference"): {
        "labels of 0: the inverse preference": of_rewards(lambda d, m, n: logistic(-d - m)),
        "sum for difference": lambda s, r: logistic(r.chosen + r.rejected - s.margin),
        "margin added": of_rewards(lambda d, m, n: logistic(d + m)),
        "margin ignored": of_rewards(lambda d, m, n: logistic(d)),
        "margin outside the sigmoid": of_rewards(lambda d, m, n: logistic(d) + m),
    },
    ("rm", check_gradient, "preference"): {
        "chosen reward detached": lambda s, r: BradleyTerry.preference(s, detached(r, "chosen")),
        "rejected reward detached": lambda s, r: BradleyTerry.preference(s, detached(r, "rejected")),
    },
    ("rm, a margin and smoothing", check_points, "preference"): {
        "smoothing ignored": of_rewards(lambda d, m, n: logistic(d - m)),
    },
    ("rm, margins from the data", check_points, "preference"): {
        "margin of the data ignored": of_rewards(lambda d, m, n: logistic(d - m)),
        "margin of the data added": of_rewards(lambda d, m, n: logistic(d - m + n)),
        "margin of the data subtracted twice": of_rewards(lambda d, m, n: logistic(d - m - 2 * n)),
        "margin of the data alone": of_rewards(lambda d, m, n: logistic(d - n)),
    },
    ("rm, margins from the data", check_independence, "preference"): {
        "margins averaged over the batch": of_rewards(lambda d, m, n: logistic(d - m - n.mean())),
    },
    ("rm", check_points, "__call__"): {
        "centring the difference": centred(lambda chosen, rejected: (chosen - rejected) ** 2),
        "centring the mean": centred(lambda chosen, rejected: ((chosen + rejected) / 2) ** 2),
        "centring without the square": centred(lambda chosen, rejected: (chosen + rejected).abs()),
        "centring each reward": centred(lambda chosen, rejected: chosen**2 + rejected**2),
        "centring ignored": lambda s, r: s.preference(r),
    },
    ("rm, with language modelling", check_points, "language_modelling"): {
        "likelihood minimised": lambda s, r: r.chosen_logps / r.chosen_length,
        "sum for mean": lambda s, r: -r.chosen_logps,
        "divided by a token too few": lambda s, r: -r.chosen_logps / (r.chosen_length - 1),
    },
    ("rm, with language modelling", check_gradient, "language_modelling"): {
        "detached": lambda s, r: -r.chosen_logps.detach() / r.chosen_length,
        "weight ignored": lambda s, r: -r.chosen_logps / r.chosen_length / s.lm_weight,
    },
    # --- what is logged ---
    ("dpo", check_points, "rewards"): {
        "rewards without beta": lambda s, p: (w(p), l(p)),
        "rewards swapped": lambda s, p: (s.beta * l(p), s.beta * w(p)),
        "chosen reward for both": lambda s, p: (s.beta * w(p), s.beta * w(p)),
    },
    ("simpo", check_points, "rewards"): {
        "gamma taken from the reward": lambda s, p: (
            SimPO.rewards(s, p)[0] - s.gamma,
            SimPO.rewards(s, p)[1],
        ),
    },
    ("dpo", check_metrics, "metrics"): {
        "a tie is a win": metric("rewards/accuracies", lambda s, p, _: w(p) >= l(p)),
        "accuracy of the log-probs": metric("rewards/accuracies", lambda s, p, _: p.chosen > p.rejected),
        "reward without beta": metric("rewards/chosen", lambda s, p, _: w(p)),
        "margin upside down": metric("rewards/margins", lambda s, p, _: -s.z(p)),
        "log-probs per token": metric("logps/chosen", lambda s, p, _: p.mean_logps()[0]),
        "one value for the batch": metric("loss", lambda s, p, losses: losses.mean()),
        "every pair saturated": metric("saturated", lambda s, p, losses: losses > 0),
    },
    ("simpo", check_metrics, "metrics"): {
        "gamma taken from the margin": metric("rewards/margins", lambda s, p, _: s.z(p)),
    },
    ("dpo", check_gradient, "gradient_weights"): {
        "the gradients themselves": lambda s, p: tuple(-weight for weight in DPO.gradient_weights(s, p)),
        "without beta": lambda s, p: tuple(weight / s.beta for weight in DPO.gradient_weights(s, p)),
        "of the chosen response alone": lambda s, p: DPO.gradient_weights(s, p)[:1],
    },
    # --- settings ---
    ("dpo", check_refusals, "__post_init__"): {"settings unchecked": lambda s: None},
    ("rm", check_refusals, "__post_init__"): {"settings unchecked": lambda s: None},
}
OTHER_DEFAULTS = {
    "dpo": (DPO(beta=0.2), DPO(label_smoothing=0.1), DPO(length_normalize=True)),
    "ipo": (IPO(beta=0.2), IPO(length_normalize=True)),
    "simpo": (SimPO(beta=2.5), SimPO(gamma=0.5), SimPO(label_smoothing=0.1)),
}
