"""SimPO, Meng et al. 2024, Eq. 6: average log-probs and no reference."""

import torch
import torch.nn.functional as F

from minidpo.verify.claims import Claims, logistic, repeated, sigma
from minidpo.verify.exact_world import best_policy, optimal_policy

PAIR = dict(chosen=-10, rejected=-20, chosen_length=4, rejected_length=5)  # averages -2.5 and -4


def z(p, s):
    return s.beta * p.chosen / p.chosen_length - s.beta * p.rejected / p.rejected_length - s.gamma


def gradient(p, s):
    """d loss / d z = sigma(z) - (1-e), as in DPO; d z / d log pi = +-beta / |y|."""
    slope = s.beta * (sigma(z(p, s)) - (1 - s.label_smoothing))
    return dict(chosen=slope / p.chosen_length, rejected=-slope / p.rejected_length)


def louder(p):
    """The same nats are added to every token of both responses."""
    return {name: vars(p)[name] - 2 * vars(p)[f"{name}_length"] for name in ("chosen", "rejected")}


def optimum(world, s):
    """Without a margin beta log pi / |y| = r* + a constant. With one, a lone pair goes to the difference of
    rewards m at which p/(1-p) = sigma(m + gamma) / sigma(gamma - m), which is no difference of scores across
    three or more responses."""

    def losses(logps):
        m = s.beta * logps / world.lengths
        return -F.logsigmoid(m[:, :, None] - m[:, None, :] - s.gamma)

    if s.gamma:
        return best_policy(world, losses)
    return optimal_policy(torch.zeros_like(world.rewards), world.rewards, s.beta, world.lengths)


CLAIMS = Claims(
    points=[
        # beta = 2 and gamma = 1 by default: -5 - -8 = 3; z = 3 - 1 = 2; ln(1 + exp(-2)) = ln 1.1353352832
        (dict(), PAIR, 0.1269280110),
        # -2.5 - -4 = 1.5; z = 1.5 - 0.5 = 1, because gamma stands outside beta; ln(1 + exp(-1))
        (dict(beta=1.0, gamma=0.5), PAIR, 0.3132616875),
        (dict(), PAIR | dict(rejected=-12.5), 1.3132616875),  # equal averages: z = -gamma = -1; ln(1 + e)
        (dict(label_smoothing=0.1), PAIR, 0.3269280110),  # e z = 0.1 * 2 more
        (dict(sft_weight=0.5), PAIR, 1.3769280110),  # 0.5 * 10 / 4 = 1.25 more than the first
    ],
    twin=lambda p, s: logistic(z(p, s), s.label_smoothing),
    gradient=gradient,
    unmoved={
        "the same nats added to every token of both responses": louder,
        "both responses said three times": repeated,
    },
    optimum=optimum,
    optima={"SimPO, gamma 0": dict(gamma=0.0), "SimPO, gamma 1": dict()},
)
