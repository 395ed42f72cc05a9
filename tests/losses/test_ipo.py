"""IPO, Azar et al. 2023, Eq. 17: summed log-ratios, and log-ratios per token."""

import pytest
from loss_checks import CHECKS, LOGPS, Claims, check_unmoved, pair_metrics
from test_dpo import PAIR, START

from minidpo.losses import IPO
from minidpo.verify.exact_world import beats_sampler, optimal_policy

POINTS = [
    # PAIR has log-ratios of 3 and -1, so h = 4; beta = 0.1 by default, so the target is 1/(2 * 0.1) = 5
    (dict(), PAIR, 1.0),  # (4 - 5)^2
    (dict(beta=0.5), PAIR, 9.0),  # 1/(2 * 0.5) = 1; (4 - 1)^2
    (dict(), START, 25.0),  # h = 0: 1/(4 * 0.1^2)
    (dict(length_normalize=True), PAIR, 16.4025),  # per token 3/4 and -1/5, so h = 0.95; (0.95 - 5)^2
]


def ratios(p, s):
    chosen, rejected = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    if s.length_normalize:
        chosen, rejected = chosen / p.chosen_length, rejected / p.rejected_length
    return chosen, rejected


def distance(p, s):
    """h - 1/(2 beta)"""
    chosen, rejected = ratios(p, s)
    return chosen - rejected - 1 / (2 * s.beta)


def gradient(p, s):
    """d loss / d h = 2 (h - 1/(2 beta)), which is 0 at the target; d h / d log pi = +-1, or +-1 / |y|."""
    chosen = rejected = 2 * distance(p, s)
    if s.length_normalize:
        chosen, rejected = chosen / p.chosen_length, rejected / p.rejected_length
    return dict(chosen=chosen, rejected=-rejected, ref_chosen=-chosen, ref_rejected=rejected)


CLAIMS = Claims(
    POINTS,
    optimum=(dict(beta=0.2), lambda world: optimal_policy(world.reference_logps, beats_sampler(world), 0.2)),
    twin=lambda p, s: distance(p, s) ** 2,
    gradient=gradient,
    metrics=lambda p, s: pair_metrics(p, *(s.beta * ratio for ratio in ratios(p, s))),
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("loss", [IPO(), IPO(length_normalize=True)], ids=str)
def test_claims(loss, check):
    """The check of loss_checks.py finds them true."""
    check(loss, CLAIMS)


@pytest.mark.parametrize("names", [LOGPS[::2], LOGPS[1::2], LOGPS[:2], LOGPS[2:]], ids=str)
def test_shifts(names):
    """Only the difference of log-ratios matters: the same number may be added to both of these."""
    check_unmoved(IPO(), CLAIMS, lambda p: {name: getattr(p, name) + 8.0 for name in names})
