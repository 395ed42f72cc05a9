"""DPO, Rafailov et al. 2023, Eq. 7: summed log-ratios, log-ratios per token, and label smoothing."""

from minidpo.verify.claims import (
    OF_THE_DIFFERENCE,
    PAIR,
    START,
    Claims,
    logistic_loss,
    margin,
    of_log_ratios,
    pair_metrics,
    repeated,
    rewards,
    sigma,
    with_sft,
)
from minidpo.verify.exact_world import optimal_policy

POINTS = [
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
    (
        dict(margin_from_data=True, label_smoothing=0.1),
        PAIR | dict(margin=0.25),
        0.6359570478,
    ),  # e z = 0.015 more
]


def gap(p, s):
    return margin(p, s, s.length_normalize)


def offset(p, s):
    return p.margin if s.margin_from_data else 0.0


def z(p, s):
    return gap(p, s) - offset(p, s)


def gradient(p, s):
    """d loss / d z = -(1-e) sigma(-z) + e sigma(z) = sigma(z) - (1-e); d z / d log pi = +-beta (/ |y|)."""
    slope = sigma(z(p, s)) - (1 - s.label_smoothing)
    return of_log_ratios(p, s.beta * slope, s.length_normalize) | dict(margin=-slope * s.margin_from_data)


def mirror(p, s):
    """Without an offset -log sigma(-z) + log sigma(z) = z, so that this is (1-2e) z."""
    e = s.label_smoothing
    return logistic_loss(-gap(p, s) - offset(p, s), e) - logistic_loss(z(p, s), e)


CLAIMS = with_sft(
    Claims(
        POINTS,
        optimum=(dict(beta=0.5), lambda world: optimal_policy(world.reference_logps, world.rewards, 0.5)),
        twin=lambda p, s: logistic_loss(z(p, s), s.label_smoothing),
        gradient=gradient,
        metrics=lambda p, s: pair_metrics(p, *rewards(p, s, s.length_normalize)),
        mirror=mirror,
        unmoved=OF_THE_DIFFERENCE
        | {"per token, both responses said three times": (dict(length_normalize=True), repeated)},
        direction=dict(),
    )
)
