"""KTO, the loss that needs no pairs: each record has one response and a label, desirable or not."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidpo.losses.inputs import PairLogps, given
from minidpo.losses.preference import Metric, PreferenceLoss
from minidpo.settings import positive, setting


@dataclass(frozen=True)
class KTO(PreferenceLoss):
    """Kahneman-Tversky optimisation. Ethayarajh et al. 2024.

        loss = lambda (1 - sigma(z)),    g = log pi(y|x)/pi_ref(y|x)
        z = beta (g - z0), lambda = lambda_d    of a desirable response
        z = beta (z0 - g), lambda = lambda_u    of an undesirable one

    z0, the reference point, says how much likelier than pi_ref the policy finds responses; in the paper it
    estimates KL(pi || pi_ref). Each prompt of the batch is paired with the response of the record before it
    (*mismatched*), and z0 is the mean log-ratio of these, or 0 if that is negative (computed in
    training/reference_point.py, over the whole batch and without gradient). A loss of lambda / 2 means that a
    response's log-ratio equals z0, as at the start. A pair is read as two records.

    `chosen` is here the one response of a record, whatever its label.
    """

    name, unit, usual_lr = "kto", "utility", (5e-7, 5e-6)
    responses, needs_reference, unpaired, needs_z0 = 1, True, True, True
    equation, gradient = "lambda (1 - sigma(z))", "+-lambda beta sigma(z) sigma(-z)"

    beta: float = setting(0.1, "strength of the pull towards the reference", positive)
    lambda_d: float = setting(1.0, "weight of desirable responses", positive)
    lambda_u: float = setting(1.0, "weight of undesirable responses", positive)

    def reward(self, logps: PairLogps) -> Tensor:
        """beta log pi(y|x)/pi_ref(y|x), (B,)."""
        return self.beta * (logps.chosen - given("ref_chosen", logps.ref_chosen))

    def z(self, logps: PairLogps) -> Tensor:
        # Both labels in one batch: an undesirable response gains by falling below z0.
        gain = self.reward(logps) - self.beta * given("z0", logps.z0)
        return torch.where(given("label", logps.label), gain, -gain)

    def __call__(self, logps: PairLogps) -> Tensor:
        losses = torch.sigmoid(-self.z(logps))  # 1 - sigma(z), without the rounding of a difference
        return torch.where(given("label", logps.label), self.lambda_d * losses, self.lambda_u * losses)

    def metrics(self, logps: PairLogps, losses: Tensor) -> dict[str, Metric]:
        """rewards/chosen is the mean over desirable responses alone, rewards/rejected over the others."""
        label, reward = given("label", logps.label), self.reward(logps)
        # (numbers, mask): the mean is over the responses where the mask is true.
        return {
            "loss": losses,
            "rewards/chosen": (reward, label),
            "rewards/rejected": (reward, ~label),
            # Whether the log-ratio is above z0 (desirable) or below it (undesirable): at the start neither.
            "accuracy": self.z(logps) > 0,
            "z0": given("z0", logps.z0),
            "logps/chosen": logps.chosen,
            "response_length/chosen": given("chosen_length", logps.chosen_length),
        }
