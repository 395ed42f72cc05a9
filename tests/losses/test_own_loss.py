"""A loss of your own: write the class, say what you claim of it, and run the checks.

The example is robust DPO (Chowdhury et al. 2024), which is no part of minidpo. To make a loss a `loss.name`,
put its class into LOSSES of minidpo/losses/preference.py and its claims into tests/losses/test_NAME.py.
"""

from dataclasses import dataclass

import pytest
from loss_checks import CHECKS, Claims
from test_dpo import PAIR, START
from torch import Tensor

from minidpo.losses import PairLogps, PreferenceLoss, logistic
from minidpo.settings import positive, setting, smoothing
from minidpo.verify.exact_train import train_to_convergence
from minidpo.verify.exact_world import make_world, optimal_policy, total_variation


# 1. The class. Its fields are its settings: default, a line of help, which values are allowed.
@dataclass(frozen=True)
class RobustDPO(PreferenceLoss):
    """DPO whose expectation does not change when a share e (flip_rate) of the labels is swapped.

    loss = ( -(1-e) log sigma(z) + e log sigma(-z) ) / (1 - 2e),    z as in DPO
    """

    name, needs_reference = "robust_dpo", True
    equation, gradient = "(-(1-e) log sigma(z) + e log sigma(-z)) / (1-2e)", "beta (sigma(-z) + e / (1-2e))"

    beta: float = setting(0.1, "strength of the pull towards the reference", positive)
    flip_rate: float = setting(0.1, "share of swapped labels", smoothing)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.log_ratios()
        return self.beta * chosen, self.beta * rejected

    def __call__(self, pairs: PairLogps) -> Tensor:
        z, e = self.z(pairs), self.flip_rate
        return ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)


# 2. What you claim: points computed by hand, and as many equations as you can write (see test_dpo.py).
CLAIMS = Claims(
    points=[
        # z = 0.1 * 4 = 0.4, e = 0.1: (0.9 * 0.5130152524 - 0.1 * 0.9130152524) / 0.8
        (dict(), PAIR, 0.4630152524),
        (dict(), START, 0.6931471806),  # z = 0: ln 2 (1-e - e)/(1-2e) = ln 2
    ],
    optimum="that of DPO on clean labels, where those seen are swapped: test_optimum below",
)


# 3. The checks.
@pytest.mark.parametrize("check", CHECKS)
def test_claims(check):
    check(RobustDPO(), CLAIMS)


# 4. Where it ends. Compare policies with the optimum that you derived: a wrong loss reaches a minimum too.
def test_optimum():
    """On labels of which a share e is swapped it ends where DPO does on clean ones."""
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    e, loss = 0.15, RobustDPO(beta=0.5, flip_rate=0.15)

    def noisy(p: PairLogps) -> Tensor:
        swapped = PairLogps(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen)
        return (1 - e) * loss(p) + e * loss(swapped)

    best = optimal_policy(world.reference_logps, world.rewards, beta=0.5)
    assert total_variation(train_to_convergence(world, noisy).values, best) < 1e-5
