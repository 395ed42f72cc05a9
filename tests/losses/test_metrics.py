"""What is logged of each pair, computed by hand. The second pair is a tie, which is no win."""

import math

import pytest
import torch

from minidpo.log import Means
from minidpo.losses import DPO, IPO, KTO, ORPO, SFT, BradleyTerry, Hinge, PairLogps, Rewards, SimPO


def column(*values):
    return torch.tensor(values, dtype=torch.float64)


# As in verify/claims: log-ratios of 3 and -1, means of -2.5 and -4. The tie has log-probs of -4 ln 2.
LN2, TIE = math.log(2), -4 * math.log(2)
LOGPS = (column(-10, TIE), column(-20, TIE), column(-13, TIE), column(-19, TIE))
PAIRS = PairLogps(*LOGPS, torch.tensor([4, 4]), torch.tensor([5, 4]))
RECORDS = PairLogps(
    column(-10, -12, -10, -20),
    ref_chosen=column(-13, -13, -13, -19),
    chosen_length=torch.tensor([4, 4, 4, 4]),
    label=torch.tensor([True, True, False, False]),
    z0=column(1, 1, 1, 1),
)
REWARDS = Rewards(column(1.5, -3), column(0.5, -3), None, column(-10, -8), torch.tensor([4, 4]))


def of_pairs(chosen, rejected, tie=0, **more):
    """All that is logged of PAIRS. chosen, rejected: rewards in the first pair; tie: both in the second."""
    return more | {
        "rewards/chosen": (chosen, tie),
        "rewards/rejected": (rejected, tie),
        "rewards/margins": (chosen - rejected, 0),
        "rewards/accuracies": (1, 0),
        "logps/chosen": (-10, TIE),
        "logps/rejected": (-20, TIE),
        "response_length/chosen": (4, 4),
        "response_length/rejected": (5, 4),
    }


CASES = [
    (DPO(), PAIRS, of_pairs(0.3, -0.1, saturated=(0, 0))),  # 0.1 * 3, 0.1 * -1
    # 0.1 * 3 / 4, 0.1 * -1 / 5
    (DPO(length_normalize=True), PAIRS, of_pairs(0.075, -0.02, saturated=(0, 0))),
    # A pair is saturated below a loss of 0.0005: ln(1 + exp(-7.55)) = 0.000526, ln(1 + exp(-7.65)) = 0.000476.
    (DPO(7.55 / 4), PAIRS, of_pairs(5.6625, -1.8875, saturated=(0, 0))),
    (DPO(7.65 / 4), PAIRS, of_pairs(5.7375, -1.9125, saturated=(1, 0))),
    (IPO(0.2, sft_weight=1.0), PAIRS, of_pairs(0.6, -0.2, preference_loss=(2.25, 6.25), sft_loss=(2.5, LN2))),
    (SimPO(gamma=9.0), PAIRS, of_pairs(-5, -8, -2 * LN2, saturated=(0, 0))),  # 2 * -2.5, 2 * -4
    # log odds: -2.5 - ln(1 - exp(-2.5)), -4 - ln(1 - exp(-4)), ln 1
    (ORPO(sft_weight=0.0), PAIRS, of_pairs(-2.414349, -3.981515)),
    (Hinge(0.5), PAIRS, of_pairs(1.5, -0.5, saturated=(1, 0))),
    (SFT(), PAIRS, {"logps/chosen": (-10, TIE), "response_length/chosen": (4, 4)}),
    (
        KTO(),  # the second response is where z0 is: nothing is won
        RECORDS,
        {
            "rewards/chosen": (0.3, 0.1),  # of the desirable responses
            "rewards/rejected": (0.3, -0.1),
            "accuracy": (1, 0, 0, 1),
            "z0": (1, 1, 1, 1),
            "logps/chosen": (-10, -12, -10, -20),
            "response_length/chosen": (4, 4, 4, 4),
        },
    ),
    (
        BradleyTerry(center_weight=1.0),
        REWARDS,
        {
            "preference_loss": (0.313262, LN2),  # ln(1 + exp(-1))
            "accuracy": (1, 0),
            "margin": (1, 0),
            "mean_reward": (1, -3),
            "lm_loss": (2.5, 2),
        },
    ),
]


@pytest.mark.parametrize(("loss", "given", "expected"), CASES, ids=[str(case[0]) for case in CASES])
def test_metrics(loss, given, expected):
    """The logged numbers of each loss, computed by hand."""
    losses = loss(given)
    found = loss.metrics(given, losses)
    assert found.keys() == expected.keys() | {"loss"} and found["loss"] is losses
    for name, values in expected.items():
        numbers, mask = found[name] if isinstance(found[name], tuple) else (found[name], ...)
        torch.testing.assert_close(numbers[mask].double(), column(*values), rtol=1e-6, atol=1e-6, msg=name)


def test_means():
    """Means are over all pairs or those of the mask, however the batch is cut; without any there is none."""
    totals = Means()
    for part in (slice(0, 1), slice(1, 4)):  # the first part has no undesirable response
        values, label = column(1, 2, 3, 6)[part], RECORDS.label[part]
        none = torch.zeros_like(label)
        totals.add(dict(all=values, liked=(values, label), disliked=(values, ~label), none=(values, none)))
    assert totals.means() == dict(all=3.0, liked=1.5, disliked=4.5)
