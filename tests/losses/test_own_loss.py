"""Add your own loss: write the class, describe it, and the whole battery runs on it.

The example is robust DPO (Chowdhury et al. 2024): no part of minidpo, kept here to be copied. To make a loss
a `loss.name`, put its class into minidpo/losses/preference.py, its name into LOSSES there, and its case into
loss_table.py.
"""

from dataclasses import dataclass, replace

import battery
import equations as eq
import pytest
from case import Case, Point, close
from loss_table import PAIR, SETTLED, dpo
from torch import Tensor

from minidpo.losses import DPO, PairLogps, PreferenceLoss, logistic
from minidpo.settings import positive, setting, smoothing
from minidpo.verify.exact_train import train_to_convergence
from minidpo.verify.exact_world import make_world, optimal_policy, total_variation


# 1. Write the class. Its fields are its hyperparameters: default, a line of help, which values are allowed.
@dataclass(frozen=True)
class RobustDPO(PreferenceLoss):
    """DPO whose expectation a share e (flip_rate) of swapped labels does not change.

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


# 2. Describe it. A point computed by hand tells it from its negative. Derivatives, finiteness, bf16 and
#    independence of pairs are asked in any case; every further field is one more claim put to the test.
POINTS = (
    # z = 0.1 * 4 = 0.4, e = 0.1: (0.9 * 0.5130152524 - 0.1 * 0.9130152524) / 0.8
    Point(PAIR, 0.4630152524, (0.2, -0.2)),
    Point(SETTLED, 0.6931471806, (0.0, 0.0)),  # z = 0: ln 2 (1-e - e)/(1-2e) = ln 2
)
BARE = Case(RobustDPO(), POINTS, label="robust DPO, points alone")


def e_of(s: RobustDPO) -> float:
    """The (negative) label smoothing that gives robust DPO: 1 - e_of(s) = (1-e) / (1-2e)."""
    return -s.flip_rate / (1 - 2 * s.flip_rate)


ROBUST_DPO = Case(
    RobustDPO(),
    POINTS,
    twin=lambda p, s: eq.logistic(eq.dpo_z(p, s), e_of(s)),
    gradient=lambda p, s: eq.through_h(p, s, s.beta * eq.logistic_slope(eq.dpo_z(p, s), e_of(s))),
    metrics=eq.pair_metrics(eq.log_ratio_rewards),
    unmoved_by=eq.SUM_SHIFTS,
    mirror=lambda p, s: -eq.dpo_z(p, s) / (1 - 2 * s.flip_rate),  # log sigma(z) - log sigma(-z) = z
)


# 3. Run the battery.
@pytest.mark.parametrize("check", battery.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", [ROBUST_DPO, BARE], ids=str)
def test_battery(case, check):
    check(case)


class WithoutDenominator(RobustDPO):
    def __call__(self, pairs: PairLogps) -> Tensor:
        return super().__call__(pairs) * (1 - 2 * self.flip_rate)


def test_a_wrong_form_is_refuted():
    with pytest.raises(AssertionError):
        battery.check_points(replace(BARE, loss=WithoutDenominator()))


# 4. Claim what is special about it.
def swapped(p: PairLogps) -> PairLogps:
    return PairLogps(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_length, p.chosen_length)


def test_expectation():
    """With a share e of the labels swapped, its expectation is plain DPO on the clean ones."""
    pairs, e = dpo.pairs(dpo.draw(32)), 0.2
    robust = RobustDPO(flip_rate=e)
    close((1 - e) * robust(pairs) + e * robust(swapped(pairs)), DPO()(pairs))


# 5. See where it converges: train a transformer with it in a world whose responses are all listed. Compare
#    policies with the optimum that you derived, because a wrong loss reaches its own minimum too.
def test_optimum():
    """On swapped labels it ends at the optimum of DPO on clean ones: pi_ref exp(r* / beta), normalised."""
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    e, beta = 0.15, 0.5
    loss = RobustDPO(beta, e)
    trained = train_to_convergence(world, lambda p: (1 - e) * loss(p) + e * loss(swapped(p)))
    best = optimal_policy(world.reference_logps, world.rewards, beta)
    assert total_variation(trained.values, best) < 1e-5
