"""DPO, Rafailov et al. 2023, Eq. 7: summed log-ratios, log-ratios per token, and label smoothing."""

import torch.nn.functional as F

from minidpo.verify.claims import OF_THE_DIFFERENCE, PAIR, START, Claims, logistic, margin, of_margin, sigma
from minidpo.verify.exact_world import best_policy, optimal_policy


def z(p, s):
    return s.beta * margin(p, s.length_normalize) - (p.margin if s.margin_from_data else 0.0)


def gradient(p, s):
    """d loss / d z = -(1-e) sigma(-z) + e sigma(z) = sigma(z) - (1-e); d z / d log pi = +-beta (/ |y|)."""
    slope = sigma(z(p, s)) - (1 - s.label_smoothing)
    return of_margin(p, s.beta * slope, s.length_normalize) | dict(margin=-slope * s.margin_from_data)


def mirror(p, s):
    """Without an offset -log sigma(-z) + log sigma(z) = z, so that this is (1-2e) z."""
    e, swapped = s.label_smoothing, z(p, s) - 2 * s.beta * margin(p, s.length_normalize)
    return logistic(swapped, e) - logistic(z(p, s), e)


def optimum(world, s):
    """The expected loss is least where z, and with it the difference of beta g, is r*(y) - r*(y'): at
    pi_ref exp(r*/beta) / Z, or with averages, beta g / |y| = r* + a constant.

    With smoothing a lone pair goes to z = logit((1-e) p + e (1-p)), which is no difference of scores across
    three or more responses; an SFT term ties every response to all others. Neither has a closed form. But the
    loss is convex in the scores of a softmax: its normaliser cancels in g(w) - g(l), and -log pi(w) is
    convex. So there is one minimum.
    """

    def losses(logps):
        g, per_token, e = logps - world.reference_logps, logps / world.lengths, s.label_smoothing
        z = s.beta * (g[:, :, None] - g[:, None, :])
        return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z) - s.sft_weight * per_token[:, :, None]

    if s.label_smoothing or s.sft_weight:
        return best_policy(world, losses)
    lengths = world.lengths if s.length_normalize else None
    return optimal_policy(world.reference_logps, world.rewards, s.beta, lengths)


CLAIMS = Claims(
    points=[
        # PAIR has log-ratios of 3 and -1; beta = 0.1 by default, so z = 0.1 * (3 - -1) = 0.4;
        # ln(1 + exp(-0.4)) = ln 1.6703200460
        (dict(), PAIR, 0.5130152524),
        (dict(beta=0.25), PAIR, 0.3132616875),  # z = 0.25 * 4 = 1; ln(1 + exp(-1)) = ln 1.3678794412
        (dict(), START, 0.6931471806),  # z = 0; ln 2
        # 0.04 = e z = 0.1 * 0.4 more than without smoothing: -log sigma(-z) = -log sigma(z) + z
        (dict(label_smoothing=0.1), PAIR, 0.5530152524),
        # per token 0.75 and -0.2: z = 0.1 * (0.75 - -0.2) = 0.095; ln(1 + exp(-0.095)) = ln 1.9093729345
        (dict(length_normalize=True), PAIR, 0.6467748816),
        (dict(sft_weight=0.5), PAIR, 1.7630152524),  # 0.5 * 10 / 4 = 1.25 more than the first
        # z = 0.4 - 0.25 = 0.15; ln(1 + exp(-0.15)) = ln 1.8607079764
        (dict(margin_from_data=True), PAIR | dict(margin=0.25), 0.6209570478),
        # e z = 0.015 more
        (dict(margin_from_data=True, label_smoothing=0.1), PAIR | dict(margin=0.25), 0.6359570478),
    ],
    twin=lambda p, s: logistic(z(p, s), s.label_smoothing),
    gradient=gradient,
    mirror=mirror,
    unmoved=OF_THE_DIFFERENCE,
    optimum=optimum,
    optima={
        "DPO": dict(beta=0.5),
        "DPO, smoothing 0.1": dict(beta=0.5, label_smoothing=0.1),
        "DPO, averages": dict(beta=1.0, length_normalize=True),
        "DPO, SFT weight 0.5": dict(beta=0.5, sft_weight=0.5),
    },
)
