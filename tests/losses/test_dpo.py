"""What is special about the logistic losses: they have no minimum, or a smoothed one."""

import math

import pytest
import torch

from minidpo.losses import logistic


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
