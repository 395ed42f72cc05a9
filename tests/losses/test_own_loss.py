"""A loss of your own: write the class, say what you claim of it, and run the checks.

The example is the Savage loss, which is no part of minidpo. To train with one of your own, by `loss.name`, put
its class into LOSSES of minidpo/losses/__init__.py and its claims into minidpo/verify/claims/NAME.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidpo.losses import PairLogps
from minidpo.losses.log_ratios import LogRatioLoss
from minidpo.verify import verify
from minidpo.verify.claims import PAIR, START, Claims
from minidpo.verify.exact_world import optimal_policy


# 1. The class. Its fields are its settings, here beta alone, which every loss of log-ratios has.
@dataclass(frozen=True)
class Savage(LogRatioLoss):
    """The squared error of the probability that DPO gives to the label. Savage 1971; Tang et al. 2024 (GPO).

    loss = (1 - sigma(z))^2,    z as in DPO
    """

    name, equation, gradient = "savage", "(1 - sigma(z))^2", "2 beta sigma(z) sigma(-z)^2"

    def preference(self, logps: PairLogps) -> Tensor:
        return torch.sigmoid(-self.z(logps)).square()


# 2. What you claim: points computed by hand, and as many equations as you can write (see claims/dpo.py).
# Where it ends: if y_w is preferred with probability p, the expected loss with q = sigma(z) is
# p (1-q)^2 + (1-p) q^2, which is least at q = p, as for DPO. In `optimum`, s is the loss with its settings.
CLAIMS = Claims(
    points=[
        (dict(), PAIR, 0.1610515942),  # z = 0.1 * 4 = 0.4; sigma(-0.4) = 0.4013123399, squared
        (dict(), START, 0.25),  # z = 0; (1/2)^2
    ],
    optimum=lambda world, s: optimal_policy(world.reference_logps, world.rewards, s.beta),
    optima={"Savage": dict(beta=0.5)},
)


# 3. The checks.
def test_claims():
    """A loss that is not part of the package passes every check of its claims."""
    report = verify(Savage(), claims=CLAIMS)
    assert not report.refuted, report
