"""The losses. Start with preference.py: DPO, IPO, SimPO, SFT and the table LOSSES. reward.py has the reward
model's loss, inputs.py the tensors that losses read."""

from minidpo.losses.inputs import PairLogps, Rewards
from minidpo.losses.preference import DPO, IPO, LOSSES, SATURATED, SFT, PreferenceLoss, SimPO, logistic
from minidpo.losses.reward import BradleyTerry, bradley_terry

__all__ = [
    "DPO",
    "IPO",
    "LOSSES",
    "SATURATED",
    "SFT",
    "BradleyTerry",
    "PairLogps",
    "PreferenceLoss",
    "Rewards",
    "SimPO",
    "bradley_terry",
    "logistic",
]
