"""Proofs about losses, ours and other programs'. `verify(loss)` makes every check that the claims allow:

    def my_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        ...                                         # B losses, a tuple that begins with them, or their mean
    print(verify(my_loss, like=DPO(beta=0.1)))      # held to what is claimed of DPO

claims/ says what is claimed of each of ours, draws.py and checks.py how it is asked, stranger.py how another
program's function is read, exact_world.py and exact_train.py where training ends.
"""

from minidpo.verify.claims import OF_THE_DIFFERENCE, Claims, claims_of, every_loss, repeated, shifted
from minidpo.verify.report import BY_NAME, Report, Verdict, verify

__all__ = [
    "BY_NAME",
    "OF_THE_DIFFERENCE",
    "Claims",
    "Report",
    "Verdict",
    "claims_of",
    "every_loss",
    "repeated",
    "shifted",
    "verify",
]
