"""The preference losses, one class each, and LOSSES, the table that the rest of minidpo reads.

Notation (paper symbol -> here), everything in nats:
    x, y_w, y_l          prompt, chosen response, rejected response
    log pi(y|x)          pairs.chosen, pairs.rejected: summed over the response's tokens, EOS included
    log pi_ref(y|x)      pairs.ref_chosen, pairs.ref_rejected: the same under the frozen reference
    |y|                  pairs.chosen_length, pairs.rejected_length: how many tokens were summed
    sigma                the logistic function

A loss is an object: its fields are its hyperparameters (and the keys of [loss] in a configuration), and
calling it on the log-probs of B pairs returns B losses. It returns no mean, because a batch is cut into
micro-batches of unequal size and the training loop divides by the size of the whole batch.

To add a loss, write its class below, put it into LOSSES and export it in __init__.py. The configuration,
--help, `explain`, the plots and train_dpo.py need no other change; the tests need an entry in
tests/losses/loss_table.py and one in tests/training/test_applied_gradients.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.losses.inputs import PairLogps, given
from minidpo.settings import check_fields, not_negative, positive, setting, smoothing

# A logistic loss this small leaves less than a thousandth of the gradient that a pair has at z = 0.
SATURATED = 5e-4


def logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1-e) log sigma(z) - e log sigma(-z): Bradley-Terry, where a share e of the labels is taken to be
    swapped."""
    if label_smoothing == 0:
        return -F.logsigmoid(z)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


class PreferenceLoss:
    """What every loss has. The class attributes describe it for --help, `explain` and the plots; see DPO.

    `explain` prints the first line of a loss's docstring, and the equation, which is its second paragraph.
    """

    name = equation = ""
    # -d loss / d log pi(y_w|x) at the default settings; for y_l the sign changes, and |y| is |y_l|
    gradient = ""
    trl = ""  # its loss_type in TRL, for bench and the parity tests; empty if there is none
    needs_reference = False
    responses = 2  # how many responses of a pair it reads; 1: the chosen one alone
    saturates = False  # whether it is -log sigma(z), which leaves no gradient for a large z
    unit = "nats"
    usual_lr = (5e-7, 1e-5)  # lowest and highest published for models of a billion parameters and more

    def __post_init__(self) -> None:
        check_fields(self.name, self)  # ValueError: "dpo: beta is 0; it must be > 0"

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The implicit rewards r(x, y_w) and r(x, y_l); where a paper defines none, what it compares."""
        raise NotImplementedError

    def z(self, pairs: PairLogps) -> Tensor:
        """What the preference is a function of: unless overridden, the margin r(x, y_w) - r(x, y_l)."""
        chosen, rejected = self.rewards(pairs)
        return chosen - rejected

    def __call__(self, pairs: PairLogps) -> Tensor:
        """B losses, differentiable in every log-prob of `pairs`, and finite for every log-prob <= 0."""
        raise NotImplementedError

    def metrics(self, pairs: PairLogps, losses: Tensor) -> dict[str, Tensor]:
        """What is logged of each pair, under the names that TRL uses. Accuracy counts strict wins."""
        chosen, rejected = self.rewards(pairs)
        values = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
        }
        if self.saturates:
            values["saturated"] = losses < SATURATED
        return values | {
            "logps/chosen": pairs.chosen,
            "logps/rejected": given("rejected", pairs.rejected),
            "response_length/chosen": given("chosen_length", pairs.chosen_length),
            "response_length/rejected": given("rejected_length", pairs.rejected_length),
        }

    def gradient_weights(self, pairs: PairLogps) -> tuple[Tensor, ...]:
        """-d loss / d log pi(y|x) of each response it reads: how hard a pair pulls on it, by autograd for any
        loss."""
        names = ("chosen", "rejected")[: self.responses]
        logps = [
            given(name, value).detach().requires_grad_() for name, value in zip(names, pairs, strict=False)
        ]
        losses = self(PairLogps(*logps, *pairs[self.responses :]))
        return tuple(-gradient for gradient in torch.autograd.grad(losses.sum(), logps))


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Direct preference optimisation. Rafailov et al. 2023, Eq. 7.

        loss = -log sigma(z),    z = beta [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ]

    At the start, where policy and reference are equal, z = 0 and the loss is ln 2 = 0.6931. The loss depends
    on the difference alone, so both log-probs may fall while it improves: watch logps/chosen. label_smoothing
    makes it conservative DPO (Mitchell 2023). Robust DPO (Chowdhury et al. 2024) is another loss.
    """

    name, trl, needs_reference, saturates = "dpo", "sigmoid", True, True
    equation, gradient = "-log sigma(z)", "beta * sigma(-z)"

    beta: float = setting(0.1, "strength of the pull towards the reference", positive)
    label_smoothing: float = setting(0.0, "assumed share of swapped labels", smoothing)
    length_normalize: bool = setting(False, "log-ratios per token instead of summed")

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.log_ratios(per_token=self.length_normalize)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, pairs: PairLogps) -> Tensor:
        return logistic(self.z(pairs), self.label_smoothing)


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Identity preference optimisation. Azar et al. 2023, Eq. 17; beta is the paper's tau.

        loss = (h - 1/(2 beta))^2,    h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

    DPO always gains from a larger margin; IPO pulls the margin to a target. At the start the loss is
    1/(4 beta^2). The equation sums log-probs; the authors ran it per token (length_normalize), and then beta
    means another thing.
    """

    name, trl, needs_reference, unit = "ipo", "ipo", True, "nats²"
    equation, gradient = "(h - 1/(2 beta))^2", "2 (1/(2 beta) - h)"

    beta: float = setting(0.1, "tau: the target of the margin of log-ratios is 1/(2 beta)", positive)
    length_normalize: bool = setting(False, "log-ratios per token instead of summed")

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.log_ratios(per_token=self.length_normalize)
        return self.beta * chosen, self.beta * rejected

    def z(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = pairs.log_ratios(per_token=self.length_normalize)
        return chosen - rejected  # h: the paper's equation has no beta here

    def __call__(self, pairs: PairLogps) -> Tensor:
        return (self.z(pairs) - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """Simple preference optimisation. Meng et al. 2024, Eq. 6.

        loss = -log sigma(z),    z = beta log pi(y_w|x)/|y_w| - beta log pi(y_l|x)/|y_l| - gamma

    The reward is the average log-prob, so there is no reference, and only a small learning rate keeps the
    policy near its start. gamma stands outside beta, as in the paper; code that asks for gamma_beta_ratio
    means gamma / beta.
    """

    name, trl, usual_lr, saturates = "simpo", "simpo (CPOTrainer, cpo_alpha=0)", (3e-7, 5e-6), True
    equation, gradient = "-log sigma(z)", "beta * sigma(-z) / |y|"

    beta: float = setting(2.0, "scale of the reward, which is an average log-prob", positive)
    gamma: float = setting(1.0, "margin that the chosen reward must win by, outside beta", not_negative)
    label_smoothing: float = setting(0.0, "assumed share of swapped labels", smoothing)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.mean_logps()
        return self.beta * chosen, self.beta * rejected

    def z(self, pairs: PairLogps) -> Tensor:
        return super().z(pairs) - self.gamma

    def __call__(self, pairs: PairLogps) -> Tensor:
        return logistic(self.z(pairs), self.label_smoothing)


@dataclass(frozen=True)
class SFT(PreferenceLoss):
    """Supervised fine-tuning on the chosen response: the reference that the other losses start from.

        loss = -log pi(y_w|x) / |y_w|

    The mean is taken per response, so that long responses do not outvote short ones.
    """

    name, responses, unit, usual_lr = "sft", 1, "nats per token", (1e-6, 5e-5)
    equation, gradient = "-log pi(y_w|x) / |y_w|", "1 / |y|"

    def z(self, pairs: PairLogps) -> Tensor:
        return pairs.chosen / given("chosen_length", pairs.chosen_length)

    def __call__(self, pairs: PairLogps) -> Tensor:
        return -self.z(pairs)

    def metrics(self, pairs: PairLogps, losses: Tensor) -> dict[str, Tensor]:
        length = given("chosen_length", pairs.chosen_length)
        return {"loss": losses, "logps/chosen": pairs.chosen, "response_length/chosen": length}


LOSSES: dict[str, type[PreferenceLoss]] = {loss.name: loss for loss in (DPO, IPO, SimPO, SFT)}
