"""Base classes of the preference losses. The losses are in log_ratios.py (DPO, IPO and others that compare
with a reference), without_reference.py (SimPO, ORPO, SFT) and kto.py; __init__.py has their table, LOSSES.

Notation (paper symbol -> here), everything in nats:
    x, y_w, y_l          prompt, chosen response, rejected response
    log pi(y|x)          logps.chosen, logps.rejected: summed over the response's tokens, EOS included
    log pi_ref(y|x)      logps.ref_chosen, logps.ref_rejected: the same under the frozen reference
    |y|                  logps.chosen_length, logps.rejected_length: how many tokens were summed
    sigma                the logistic function

A loss is an object. Its fields are its hyperparameters, which are also the keys of [loss] in a configuration.
Calling it on the log-probs of B pairs returns B losses and not their mean: a batch is cut into micro-batches
of unequal size, so only the training loop can divide by the size of the whole batch.

To add a loss of pairs, write a subclass of PairLoss with `rewards` and `preference`, put it into LOSSES in
__init__.py, and add minidpo/verify/claims/NAME.py, from which the tests take what to check (docs/verify.md).
"""

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.losses.inputs import PairLogps, given
from minidpo.settings import check_fields, not_negative, setting

# At a logistic loss this small, the gradient of a pair is less than a thousandth of what it is at z = 0.
SATURATED = 5e-4

# One number per pair, (B,), or (numbers, mask): the mean is then over the pairs where the mask is true.
Metric = Tensor | tuple[Tensor, Tensor]


def logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1-e) log sigma(z) - e log sigma(-z): Bradley-Terry with a share e of labels assumed to be swapped."""
    # logsigmoid, because log(sigmoid(z)) is -inf for z below about -88, and its gradient NaN.
    if label_smoothing == 0:
        return -F.logsigmoid(z)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


class PreferenceLoss:
    """Base class of every loss but the reward model's. DPO, in log_ratios.py, is an example.

    The class attributes say what training computes for the loss, and describe it to the commands. `explain`
    also prints the first two paragraphs of the docstring: what the loss is, and its equation in full.
    """

    # Its name in a configuration, and its equation and gradient weight in short. The gradient weight of y_w,
    # at the default settings, is -d loss / d log pi(y_w|x): how hard y_w is pushed up. That of y_l is
    # the same formula with the opposite sign and with the |y|, r and P of y_l.
    name = equation = gradient = ""
    # What it reads of a pair.
    needs_reference = False
    responses = 2  # 1: only the chosen response
    margin_from_data = False  # whether it reads the record's margin; a setting of DPO
    unpaired = False  # whether it reads labelled responses one by one; a pair is then two of them
    needs_z0 = False  # whether it reads z0, a mean over mismatched responses (see kto.py)
    # What its values mean.
    unit = "nats"
    z_is_logit = False  # whether sigma(z) is the modelled probability that y_w is preferred (Bradley & Terry)
    saturates = False  # whether the share of pairs with almost no gradient (SATURATED) is logged
    # How others train with it.
    trl = ""  # its loss_type in TRL, for bench and the parity tests; empty if TRL has none
    usual_lr = (5e-7, 1e-5)  # lowest and highest published for models of a billion parameters and more

    def __post_init__(self) -> None:
        check_fields(self.name, self)  # ValueError: "dpo: beta is 0; it must be > 0"

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """The implicit rewards r(x, y_w) and r(x, y_l), or what a paper without rewards compares."""
        raise NotImplementedError

    def z(self, logps: PairLogps) -> Tensor:
        """The equation's z (of IPO, h), (B,): by default the margin r(x, y_w) - r(x, y_l)."""
        chosen, rejected = self.rewards(logps)
        return chosen - rejected

    def __call__(self, logps: PairLogps) -> Tensor:
        """B losses, differentiable in every log-prob of `logps`, and finite for log-probs from 0 to -1e5."""
        raise NotImplementedError

    def metrics(self, logps: PairLogps, losses: Tensor) -> dict[str, Metric]:
        """What is logged about each pair; rewards/* and logps/* are named as in TRL."""
        chosen, rejected = self.rewards(logps)
        values: dict[str, Metric] = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            # Strictly greater: a tie is no win (DPO and IPO start with ties only).
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
        }
        if self.saturates:
            # Training has nothing left to do for such a pair.
            values["saturated"] = losses < SATURATED
        return values | {
            # The margin can grow while both of these fall.
            "logps/chosen": logps.chosen,
            "logps/rejected": given("rejected", logps.rejected),
            "response_length/chosen": given("chosen_length", logps.chosen_length),
            "response_length/rejected": given("rejected_length", logps.rejected_length),
        }

    def gradient_weights(self, logps: PairLogps) -> tuple[Tensor, ...]:
        """-d loss / d log pi(y|x) of each response that the loss reads, (B,) each: how hard the pair pushes
        it up."""
        # Leaves of their own, so that no gradient flows on into the model.
        read = [logps.chosen, given("rejected", logps.rejected)] if self.responses == 2 else [logps.chosen]
        leaves = [value.detach().requires_grad_() for value in read]
        # The other fields follow as they are. Each loss depends on its own pair alone, so the gradient of the
        # sum holds all B gradients.
        losses = self(PairLogps(*leaves, *logps[self.responses :]))
        return tuple(-gradient for gradient in torch.autograd.grad(losses.sum(), leaves))


@dataclass(frozen=True)
class PairLoss(PreferenceLoss):
    """What every loss that compares two responses has: `preference`, and beside it an SFT term.

        loss = preference(y_w, y_l) + sft_weight * -log pi(y_w|x) / |y_w|

    A preference may be learnt while both responses become less likely; the second term holds the chosen one
    up. Pang et al. 2024 and RPO, Liu et al. 2024, add it to DPO, and ORPO has it by definition.
    """

    _: KW_ONLY  # so that DPO(0.1) sets beta: fields of a base class come first
    sft_weight: float = setting(0.0, "weight of the SFT loss on the chosen response", not_negative)

    def preference(self, logps: PairLogps) -> Tensor:
        """The loss without its SFT term, (B,)."""
        raise NotImplementedError

    def sft(self, logps: PairLogps) -> Tensor:
        """-log pi(y_w|x) / |y_w|, (B,), as in the loss SFT."""
        return -logps.chosen / given("chosen_length", logps.chosen_length)

    def __call__(self, logps: PairLogps) -> Tensor:
        losses = self.preference(logps)
        # A weight of 0 leaves the term out, so that the lengths need not be known.
        return losses + self.sft_weight * self.sft(logps) if self.sft_weight else losses

    def metrics(self, logps: PairLogps, losses: Tensor) -> dict[str, Metric]:
        values = super().metrics(logps, losses)
        if self.sft_weight:  # each term by itself
            values |= {"preference_loss": self.preference(logps), "sft_loss": self.sft(logps)}
        return values
