"""Add your own loss: write the function, describe it, and the whole battery runs on it.

The example is robust DPO (Chowdhury et al. 2024): no part of minidpo, kept here to be copied.
"""

from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

import battery
from battery import Loss, Point
from equations import POLICY, REFERENCE, SUM_SHIFTS, dpo_z, log_sigmoid, logratio_rewards
from loss_table import PAIR, SETTLED, dpo
from minidpo.commands.exact_train import AllPairs, train_to_convergence
from minidpo.commands.exact_world import make_world, optimal_policy, total_variation
from minidpo.losses import PreferenceLoss, dpo_loss


# 1. Write the function. With dpo_loss's signature it also trains wherever dpo_loss does. One that calls none of
#    minidpo's losses raises half precision itself, and leaves float64 alone:
#    x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
def robust_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    flip_rate: float = 0.1,
) -> PreferenceLoss:
    """DPO whose expectation a share e (flip_rate) of swapped labels does not change.

        loss = ( -(1-e) log sigma(z) + e log sigma(-z) ) / (1 - 2e),   z as in DPO

    dpo_loss gives -log sigma(z), and -log sigma(-z) for the swapped pair, and checks the arguments.
    """
    policy = (policy_chosen_logps, policy_rejected_logps)
    reference = (reference_chosen_logps, reference_rejected_logps)
    as_labelled = dpo_loss(*policy, *reference, beta)
    other_way = dpo_loss(*policy[::-1], *reference[::-1], beta)
    losses = ((1 - flip_rate) * as_labelled.losses - flip_rate * other_way.losses) / (1 - 2 * flip_rate)
    return as_labelled._replace(losses=losses)


# 2. Describe it. The first three fields are enough for derivatives that are those of the function, finiteness, bf16
#    and independence of pairs, but cannot tell your loss from its negative: that takes `points` or a `twin`. Every
#    further field is one more claim that is put to the test.
def robust_gradient(a) -> dict[str, np.ndarray]:
    z, e = dpo_z(a), a.flip_rate
    slope = -((1 - e) * np.exp(log_sigmoid(-z)) + e * np.exp(log_sigmoid(z))) / (1 - 2 * e)
    signs = dict(zip(POLICY + REFERENCE, (1, -1, -1, 1), strict=True))
    return {name: sign * a.beta * slope for name, sign in signs.items()}


BARE = Loss("robust DPO, three fields", robust_dpo_loss, POLICY + REFERENCE)
ROBUST_DPO = Loss(
    name="robust DPO",
    function=robust_dpo_loss,
    inputs=POLICY + REFERENCE,
    settings={"beta": 0.1, "flip_rate": 0.2},
    twin=lambda a: (
        (-(1 - a.flip_rate) * log_sigmoid(dpo_z(a)) + a.flip_rate * log_sigmoid(-dpo_z(a)))
        / (1 - 2 * a.flip_rate)
    ),
    gradient=robust_gradient,
    rewards=logratio_rewards,
    points=(
        # z = 0.4, e = 0.1: (0.9 * 0.5130152524 - 0.1 * 0.9130152524) / 0.8
        Point(PAIR, 0.4630152524, (0.2, -0.2)),
        Point(SETTLED, 0.6931471806, (0.0, 0.0)),  # z = 0: ln 2 (1-e - e)/(1-2e) = ln 2
    ),
    unmoved_by=SUM_SHIFTS,
    mirror=lambda a: -dpo_z(a) / (1 - 2 * a.flip_rate),  # log sigma(z) - log sigma(-z) = z, twice over 1-2e
)


# 3. Run the battery.
@pytest.mark.parametrize("check", battery.LOSS_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("loss", [ROBUST_DPO, BARE], ids=str)
def test_battery(loss, check):
    check(loss)


# 4. Claim what is special about it.
def test_swapping_a_share_e_of_the_labels_leaves_the_expected_robust_loss_at_plain_dpo():
    arguments, e = ROBUST_DPO.draw(32), ROBUST_DPO.settings["flip_rate"]
    kept = ROBUST_DPO.losses(ROBUST_DPO.tensors(arguments))
    flipped = ROBUST_DPO.losses(ROBUST_DPO.tensors(battery.swapped(arguments)))
    inputs = {name: value for name, value in arguments.items() if name != "flip_rate"}
    battery.close((1 - e) * kept + e * flipped, dpo.losses(dpo.tensors(inputs)).detach())


def conservative(*logps: Tensor, flip_rate: float, **named: Tensor) -> PreferenceLoss:
    return dpo_loss(*logps, **named, label_smoothing=flip_rate)


def without_its_denominator(*, flip_rate: float, **named: Tensor) -> PreferenceLoss:
    out = robust_dpo_loss(**named, flip_rate=flip_rate)
    return out._replace(losses=out.losses * (1 - 2 * flip_rate))


def detached_reference(*, reference_chosen_logps: Tensor, **named: Tensor) -> PreferenceLoss:
    return robust_dpo_loss(reference_chosen_logps=reference_chosen_logps.detach(), **named)


@pytest.mark.parametrize("wrong", [conservative, without_its_denominator, detached_reference])
def test_the_battery_refutes_a_wrong_form(wrong):
    check = battery.check_derivatives if wrong is detached_reference else battery.check_twin
    with pytest.raises(AssertionError):
        check(replace(ROBUST_DPO, function=wrong))


# 5. See where it converges: train a transformer with it in a world whose responses are all listed, and compare
#    with the optimum you derived. Compare policies: a wrong loss reaches its own minimum too. exact_world.py lists the
#    optima of all losses; `best_scores(gamma=, label_smoothing=)` has those of a logistic loss with either.
def test_robust_dpo_finds_the_optimum_of_clean_labels_in_swapped_ones():
    """With labels swapped at rate e the expectation of step 4 is plain DPO on clean labels, whose optimum is
    pi* proportional to pi_ref exp(r* / beta)."""
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    e, beta = 0.15, 0.5

    def robust(chosen_and_rejected: AllPairs, *order: int):
        return robust_dpo_loss(*(chosen_and_rejected.logps[i] for i in order), beta, e).losses

    trained = train_to_convergence(
        world, lambda b: (1 - e) * robust(b, 0, 1, 2, 3) + e * robust(b, 1, 0, 3, 2)
    )
    best = optimal_policy(world.reference_logps, world.rewards, beta)
    assert total_variation(trained.values, best) < 1e-5
