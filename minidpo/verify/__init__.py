"""Proofs about losses, ours and other programs'. `verify(loss)` makes every check that the claims allow:

    def my_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        ...                                         # B losses, a tuple that begins with them, or their mean
    print(verify(my_loss, like=DPO(beta=0.1)))      # held to what is claimed of DPO

claims/ says what is claimed of each of ours, checks.py how it is asked, with random pairs of draws.py,
stranger.py how another program's function is read. Where training ends: exact_world.py, exact_train.py.
"""

from minidpo.verify.checks import CHECKS
from minidpo.verify.claims import Claims, claims_of, every_loss
from minidpo.verify.report import Report, Verdict, verify
