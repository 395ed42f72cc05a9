"""Robust DPO, Chowdhury et al. 2024: DPO's loss of clean labels, from labels of which a share e is
swapped."""

from minidpo.verify.claims import (
    OF_THE_DIFFERENCE,
    PAIR,
    START,
    Claims,
    logistic_loss,
    margin,
    of_log_ratios,
    pair_metrics,
    rewards,
    sigma,
    with_sft,
)
from minidpo.verify.exact_world import optimal_policy
from minidpo.verify.optima import best_scores

POINTS = [
    # PAIR has z = 0.1 * 4 = 0.4, and e = 0.1: (0.9 * 0.5130152524 - 0.1 * 0.9130152524) / 0.8
    (dict(), PAIR, 0.4630152524),
    (dict(), START, 0.6931471806),  # z = 0: ln 2 (1-e - e) / (1-2e) = ln 2
    (dict(beta=0.25, flip_rate=0.0), PAIR, 0.3132616875),  # DPO's: z = 1; ln(1 + exp(-1))
    (dict(sft_weight=0.5), PAIR, 1.7130152524),  # 0.5 * 10 / 4 = 1.25 more than the first
]


def twin(p, s):
    e = s.flip_rate
    return ((1 - e) * logistic_loss(margin(p, s)) - e * logistic_loss(-margin(p, s))) / (1 - 2 * e)


def gradient(p, s):
    """d loss / d z = (-(1-e) sigma(-z) - e sigma(z)) / (1-2e) = -sigma(-z) - e / (1-2e)."""
    return of_log_ratios(p, -s.beta * (sigma(-margin(p, s)) + s.flip_rate / (1 - 2 * s.flip_rate)))


def optimum(world):
    """The labels of this world are not swapped, so that the loss takes too much off: a preference p becomes
    (p - e) / (1-2e), which is label smoothing with -e / (1-2e). (Where they are swapped it is DPO's optimum:
    `python -m minidpo exact`.)"""
    scores, _ = best_scores(world, label_smoothing=-0.01 / 0.98)
    return optimal_policy(world.reference_logps, scores, 0.5)


CLAIMS = with_sft(
    Claims(
        POINTS,
        optimum=(dict(beta=0.5, flip_rate=0.01), optimum),
        twin=twin,
        gradient=gradient,
        metrics=lambda p, s: pair_metrics(p, *rewards(p, s)),
        mirror=lambda p, s: margin(p, s) / (1 - 2 * s.flip_rate),  # ((1-e) z + e z) / (1-2e)
        unmoved=OF_THE_DIFFERENCE,
        direction=dict(),
    )
)
