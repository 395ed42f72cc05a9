"""IPO, Azar et al. 2023, Eq. 17: summed log-ratios, and log-ratios per token."""

from minidpo.verify.claims import (
    OF_THE_DIFFERENCE,
    PAIR,
    START,
    Claims,
    log_ratios,
    of_log_ratios,
    pair_metrics,
    rewards,
    with_sft,
)
from minidpo.verify.exact_world import beats_sampler, optimal_policy

POINTS = [
    # PAIR has log-ratios of 3 and -1, so h = 4; beta = 0.1 by default, so the target is 1/(2 * 0.1) = 5
    (dict(), PAIR, 1.0),  # (4 - 5)^2
    (dict(beta=0.5), PAIR, 9.0),  # 1/(2 * 0.5) = 1; (4 - 1)^2
    (dict(), START, 25.0),  # h = 0: 1/(4 * 0.1^2)
    (dict(length_normalize=True), PAIR, 16.4025),  # per token 3/4 and -1/5, so h = 0.95; (0.95 - 5)^2
    (dict(sft_weight=0.5), PAIR, 2.25),  # 0.5 * 10 / 4 = 1.25 more than the first
]


def h(p, s):
    chosen, rejected = log_ratios(p, s.length_normalize)
    return chosen - rejected


def distance(p, s):
    """h - 1/(2 beta)"""
    return h(p, s) - 1 / (2 * s.beta)


def gradient(p, s):
    """d loss / d h = 2 (h - 1/(2 beta)), which is 0 at the target; d h / d log pi = +-1, or +-1 / |y|."""
    return of_log_ratios(p, 2 * distance(p, s), s.length_normalize)


CLAIMS = with_sft(
    Claims(
        POINTS,
        optimum=(
            dict(beta=0.2),
            lambda world: optimal_policy(world.reference_logps, beats_sampler(world), 0.2),
        ),
        twin=lambda p, s: distance(p, s) ** 2,
        gradient=gradient,
        metrics=lambda p, s: pair_metrics(p, *rewards(p, s, s.length_normalize)),
        mirror=lambda p, s: 2 * h(p, s) / s.beta,  # (-h - 1/(2 beta))^2 - (h - 1/(2 beta))^2
        unmoved=OF_THE_DIFFERENCE,
    )
)
