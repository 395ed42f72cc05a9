"""The losses. Start with preference.py, then log_ratios.py, where DPO is. reward.py has the reward model's
loss, inputs.py the tensors that losses read."""

from minidpo.losses.inputs import PairLogps, Rewards
from minidpo.losses.kto import KTO
from minidpo.losses.log_ratios import DPO, IPO, APOZero, Hinge, RobustDPO
from minidpo.losses.preference import SATURATED, PairLoss, PreferenceLoss, logistic
from minidpo.losses.reward import BradleyTerry, bradley_terry
from minidpo.losses.without_reference import ORPO, SFT, SimPO

# The one place where the name of a loss is looked up.
LOSSES: dict[str, type[PreferenceLoss]] = {
    loss.name: loss for loss in (DPO, IPO, SimPO, ORPO, KTO, RobustDPO, Hinge, APOZero, SFT)
}
