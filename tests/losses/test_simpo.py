"""What is special about SimPO: how its target margin is written elsewhere."""

import torch

from minidpo.losses import SimPO
from minidpo.verify.claims import claims_of
from minidpo.verify.draws import draw, tensors


def test_gamma_beta_ratio():
    """Code that takes this ratio means gamma / beta: its margin stands inside beta."""
    claims, beta, ratio = claims_of(SimPO), 2.5, 0.3
    pairs = tensors(claims, draw(claims, 16))
    chosen, rejected = pairs.mean_logps()
    theirs = torch.nn.functional.softplus(-beta * (chosen - rejected - ratio))
    torch.testing.assert_close(SimPO(beta, gamma=beta * ratio)(pairs), theirs)
