"""The losses: preference.py has DPO and its kin and the table LOSSES (start there), reward.py the reward
model's."""

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
