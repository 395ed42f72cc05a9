"""ORPO, Hong et al. 2024, Eq. 6 and 7: odds of a response's mean log-prob, beside the SFT loss."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from minidpo.verify.claims import Claims, logistic, repeated, sigma
from minidpo.verify.exact_world import best_policy

# Geometric means of the tokens' probabilities: 1/2, whose odds are 1, and 1/4, whose odds are 1/3.
PAIR = dict(chosen=4 * math.log(1 / 2), rejected=5 * math.log(1 / 4), chosen_length=4, rejected_length=5)

SMALLEST = np.finfo(np.float32).tiny  # 1 - P is never taken to be less


def log_odds(logp, length):
    m = logp / length
    return m - np.log(-np.expm1(np.minimum(m, -SMALLEST)))


def z(p, s):
    return log_odds(p.chosen, p.chosen_length) - log_odds(p.rejected, p.rejected_length)


def gradient(p, s):
    """d loss / d z = -lambda_or sigma(-z); d log odds / d m = 1/(1-P); d m / d log pi = 1/|y|."""

    def slope(logp, length):
        return s.lambda_or * sigma(-z(p, s)) / -np.expm1(logp / length) / length

    return dict(chosen=-slope(p.chosen, p.chosen_length), rejected=slope(p.rejected, p.rejected_length))


def optimum(world, s):
    """With m = log pi / |y| and o = m - log(1 - exp m) the loss is -m(w) - lambda_or log sigma(o(w) - o(l)).

    o is convex in m, so -o(w) is not, and the loss need not be convex: the minimum is certified among the
    policies nearby alone. It lies inside, because -m(w) grows without end as any probability falls to 0.
    """

    def losses(logps):
        m = logps / world.lengths
        odds = m - torch.log(-torch.expm1(m))
        return -m[:, :, None] - s.lambda_or * F.logsigmoid(odds[:, :, None] - odds[:, None, :])

    return best_policy(world, losses)


CLAIMS = Claims(
    points=[
        # z = ln 1 - ln 1/3 = ln 3; -ln sigma(ln 3) = ln(1 + 1/3) = 0.2876820724, of which lambda_or takes a
        # tenth; the SFT loss is ln 2 = 0.6931471806
        (dict(), PAIR, 0.7219153878),
        (dict(lambda_or=1.0, sft_weight=0.0), PAIR, 0.2876820724),
        (dict(lambda_or=1.0), PAIR | dict(rejected=5 * math.log(1 / 2)), 1.3862943611),  # z = 0; ln 2 + ln 2
        # P(y_l) = 1 - 1e-12: its log odds are ln 1e12 = 27.6310211159; z and log sigma(z) are minus that
        (dict(lambda_or=1.0, sft_weight=0.0), PAIR | dict(rejected=-5e-12), 27.6310211159),
    ],
    twin=lambda p, s: s.lambda_or * logistic(z(p, s)),
    gradient=gradient,
    mirror=lambda p, s: s.lambda_or * z(p, s),
    unmoved={"both responses said three times": repeated},
    optimum=optimum,
    optima={"ORPO": dict(lambda_or=1.0)},
)
