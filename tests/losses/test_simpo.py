"""SimPO, Meng et al. 2024, Eq. 6: average log-probs and no reference."""

import pytest
import torch
from loss_checks import CHECKS, Claims, check_unmoved, draw, logistic_loss, pair_metrics, sigma, tensors

from minidpo.losses import SimPO
from minidpo.verify.exact_world import best_scores, optimal_policy

PAIR = dict(chosen=-10, rejected=-20, chosen_length=4, rejected_length=5)  # averages -2.5 and -4
POINTS = [
    # beta = 2 and gamma = 1 by default: -5 - -8 = 3; z = 3 - 1 = 2; ln(1 + exp(-2)) = ln 1.1353352832
    (dict(), PAIR, 0.1269280110),
    # -2.5 - -4 = 1.5; z = 1.5 - 0.5 = 1, because gamma stands outside beta; ln(1 + exp(-1))
    (dict(beta=1.0, gamma=0.5), PAIR, 0.3132616875),
    (dict(), PAIR | dict(rejected=-12.5), 1.3132616875),  # equal averages: z = -gamma = -1; ln(1 + e)
    (dict(label_smoothing=0.1), PAIR, 0.3269280110),  # e z = 0.1 * 2 more
]


def rewards(p, s):
    return s.beta * p.chosen / p.chosen_length, s.beta * p.rejected / p.rejected_length


def z(p, s):
    chosen, rejected = rewards(p, s)
    return chosen - rejected - s.gamma


def gradient(p, s):
    """d loss / d z = sigma(z) - (1-e), as in DPO; d z / d log pi = +-beta / |y|."""
    slope = s.beta * (sigma(z(p, s)) - (1 - s.label_smoothing))
    return dict(chosen=slope / p.chosen_length, rejected=-slope / p.rejected_length)


def optimum(world):
    scores, _ = best_scores(world, gamma=1.0)
    return optimal_policy(torch.zeros_like(scores), scores, 2.0, world.lengths)


CLAIMS = Claims(
    POINTS,
    optimum=(dict(), optimum),
    twin=lambda p, s: logistic_loss(z(p, s), s.label_smoothing),
    gradient=gradient,
    metrics=lambda p, s: pair_metrics(p, *rewards(p, s)),
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("loss", [SimPO(), SimPO(label_smoothing=0.1)], ids=str)
def test_claims(loss, check):
    """The check of loss_checks.py finds them true."""
    check(loss, CLAIMS)


def test_averages():
    """The same nats added to every token of both responses do not matter; nor does tripling both."""
    names = ("chosen", "rejected")
    check_unmoved(SimPO(), CLAIMS, lambda p: {n: vars(p)[n] - 2 * vars(p)[f"{n}_length"] for n in names})
    check_unmoved(SimPO(), CLAIMS, lambda p: {n: 3 * x for n, x in vars(p).items()})


def test_gamma_beta_ratio():
    """Code that takes this ratio means gamma / beta: its margin stands inside beta."""
    pairs, beta, ratio = tensors(CLAIMS, draw(CLAIMS, 16)), 2.5, 0.3
    chosen, rejected = pairs.mean_logps()
    theirs = torch.nn.functional.softplus(-beta * (chosen - rejected - ratio))
    torch.testing.assert_close(SimPO(beta, gamma=beta * ratio)(pairs), theirs)
