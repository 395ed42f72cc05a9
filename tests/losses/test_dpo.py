"""DPO, Rafailov et al. 2023, Eq. 7: summed log-ratios, log-ratios per token, and label smoothing.

In the equations `p` holds log-probs and lengths of the pairs, NumPy arrays, and `s` the settings of the loss.
"""

import math

import pytest
import torch
from loss_checks import CHECKS, LOGPS, Claims, check_unmoved, logistic_loss, pair_metrics, sigma

from minidpo.losses import DPO, logistic
from minidpo.verify.exact_world import optimal_policy

# log pi/pi_ref is -10 + 13 = 3 on the chosen response and -20 + 19 = -1 on the rejected one; per token, of 4
# and 5 tokens, that is 0.75 and -0.2.
PAIR = dict(zip(LOGPS, (-10, -20, -13, -19), strict=True)) | dict(chosen_length=4, rejected_length=5)
START = dict(zip(LOGPS, (-7, -9, -7, -9), strict=True))  # policy equals reference
POINTS = [
    # beta = 0.1 by default, so z = 0.1 * (3 - -1) = 0.4; ln(1 + exp(-0.4)) = ln 1.6703200460
    (dict(), PAIR, 0.5130152524),
    (dict(beta=0.25), PAIR, 0.3132616875),  # z = 0.25 * 4 = 1; ln(1 + exp(-1)) = ln 1.3678794412
    (dict(), START, 0.6931471806),  # z = 0; ln 2
    # 0.04 = e z = 0.1 * 0.4 more than without smoothing: -log sigma(-z) = -log sigma(z) + z
    (dict(label_smoothing=0.1), PAIR, 0.5530152524),
    # z = 0.1 * (0.75 - -0.2) = 0.095; ln(1 + exp(-0.095)) = ln 1.9093729345
    (dict(length_normalize=True), PAIR, 0.6467748816),
]


def rewards(p, s):
    chosen, rejected = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    if s.length_normalize:
        chosen, rejected = chosen / p.chosen_length, rejected / p.rejected_length
    return s.beta * chosen, s.beta * rejected


def z(p, s):
    chosen, rejected = rewards(p, s)
    return chosen - rejected


def gradient(p, s):
    """d loss / d z = -(1-e) sigma(-z) + e sigma(z) = sigma(z) - (1-e); d z / d log pi = +-beta (/ |y|)."""
    chosen = rejected = s.beta * (sigma(z(p, s)) - (1 - s.label_smoothing))
    if s.length_normalize:
        chosen, rejected = chosen / p.chosen_length, rejected / p.rejected_length
    return dict(chosen=chosen, rejected=-rejected, ref_chosen=-chosen, ref_rejected=rejected)


CLAIMS = Claims(
    POINTS,
    optimum=(dict(beta=0.5), lambda world: optimal_policy(world.reference_logps, world.rewards, 0.5)),
    twin=lambda p, s: logistic_loss(z(p, s), s.label_smoothing),
    gradient=gradient,
    metrics=lambda p, s: pair_metrics(p, *rewards(p, s)),
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("loss", [DPO(), DPO(label_smoothing=0.1), DPO(length_normalize=True)], ids=str)
def test_claims(loss, check):
    """Points, NumPy twin, gradient and metrics are as claimed above, and what holds for every loss holds."""
    check(loss, CLAIMS)


@pytest.mark.parametrize("names", [LOGPS[::2], LOGPS[1::2], LOGPS[:2], LOGPS[2:]], ids=str)
def test_shifts(names):
    """Only the difference of log-ratios matters: the same number may be added to both of these."""
    check_unmoved(DPO(), CLAIMS, lambda p: {name: getattr(p, name) + 8.0 for name in names})


def test_repeated():
    """Per token, a response said three times over counts as before: sums and lengths grow alike."""
    check_unmoved(DPO(length_normalize=True), CLAIMS, lambda p: {n: 3 * x for n, x in vars(p).items()})


def test_no_minimum():
    """The loss falls with every increase of z and never reaches 0; for very negative z it is about -z."""
    losses = logistic(torch.tensor([10.0, 100.0, 700.0, -1e4], dtype=torch.float64))
    assert losses[0] > losses[1] > losses[2] > 0 and losses[3] == pytest.approx(1e4)


def test_smoothed_minimum():
    """The minimum is at z = ln((1-e)/e); its value is the entropy of the labels; far out the slopes are
    -(1-e), e."""
    z, e = torch.tensor([math.log(9), -50.0, 50.0], dtype=torch.float64, requires_grad=True), 0.1
    losses = logistic(z, e)
    assert losses[0].item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-14)
    assert torch.autograd.grad(losses.sum(), z)[0].tolist() == pytest.approx([0, -0.9, 0.1], abs=1e-15)
