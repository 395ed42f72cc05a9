"""The preference losses, one class each, and LOSSES, the table that the rest of minidpo reads.

Notation (paper symbol -> here), everything in nats:
    x, y_w, y_l          prompt, chosen response, rejected response
    log pi(y|x)          logps.chosen, logps.rejected: summed over the response's tokens, EOS included
    log pi_ref(y|x)      logps.ref_chosen, logps.ref_rejected: the same under the frozen reference
    |y|                  logps.chosen_length, logps.rejected_length: how many tokens were summed
    sigma                the logistic function

A loss is an object. Its fields are its hyperparameters, which are also the keys of [loss] in a configuration.
Calling it on the log-probs of B pairs returns B losses and not their mean: a batch is cut into micro-batches
of unequal size, so only the training loop can divide by the size of the whole batch.

To add a loss, write its class below, put it into LOSSES and export it in __init__.py. The configuration,
--help, `explain`, the plots and train_dpo.py need no other change. Its tests are a file like
tests/losses/test_ipo.py and an entry in tests/training/test_applied_gradients.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.losses.inputs import PairLogps, given
from minidpo.settings import check_fields, not_negative, positive, setting, smoothing

# At a logistic loss this small, the gradient of a pair is less than a thousandth of what it is at z = 0.
SATURATED = 5e-4


def logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1-e) log sigma(z) - e log sigma(-z): Bradley-Terry with a share e of labels assumed to be swapped."""
    # logsigmoid, because log(sigmoid(z)) is -inf for z below -100, and its gradient NaN.
    if label_smoothing == 0:
        return -F.logsigmoid(z)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


class PreferenceLoss:
    """What every loss has. DPO below is an example.

    The class attributes say what training computes for the loss (needs_reference, responses), and describe it
    to --help, `explain`, the plots, the warnings of a run and the comparison with TRL. `explain` also prints
    the first line of the docstring, and the equation, which is the docstring's second paragraph.
    """

    # How it is called in a configuration, and its equation and gradient weight in short. The gradient weight
    # is -d loss / d log pi(y_w|x) at the default settings; for y_l its sign changes and |y| is |y_l|.
    name = equation = gradient = ""
    # What it reads of a pair.
    needs_reference = False
    responses = 2  # 1: only the chosen response
    # What its values mean.
    unit = "nats"
    z_is_logit = False  # whether sigma(z) is the modelled probability that y_w is preferred (Bradley & Terry)
    saturates = False  # whether its gradient vanishes for large z (without label smoothing)
    # How others train with it.
    trl = ""  # its loss_type in TRL, for bench and the parity tests; empty if TRL has none
    usual_lr = (5e-7, 1e-5)  # lowest and highest published for models of a billion parameters and more

    def __post_init__(self) -> None:
        check_fields(self.name, self)  # ValueError: "dpo: beta is 0; it must be > 0"

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        """The implicit rewards r(x, y_w) and r(x, y_l), or what a paper without rewards compares."""
        raise NotImplementedError

    def z(self, logps: PairLogps) -> Tensor:
        """The one number per pair that the loss depends on; by default the margin r(x, y_w) - r(x, y_l)."""
        chosen, rejected = self.rewards(logps)
        return chosen - rejected

    @property
    def margin_is_logit(self) -> bool:
        """Whether sigma(r(x, y) - r(x, y')) is the modelled probability that y is preferred to y'. `score`
        compares it with how often y is preferred."""
        # SimPO overrides this: with gamma > 0, z is not the margin.
        return self.z_is_logit

    def __call__(self, logps: PairLogps) -> Tensor:
        """B losses, differentiable in every log-prob of `logps`, and finite for log-probs from 0 to -1e5."""
        raise NotImplementedError

    def metrics(self, logps: PairLogps, losses: Tensor) -> dict[str, Tensor]:
        """What is logged about each pair, (B,) each; rewards/* and logps/* are named as in TRL."""
        chosen, rejected = self.rewards(logps)
        values = {
            "loss": losses,
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            # Strictly greater: a tie is no win (DPO and IPO start with ties only).
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
        }
        if self.saturates:
            # Training has nothing left to do for such a pair. If nearly all are such, the model is
            # overfitted.
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
        names = ("chosen", "rejected")[: self.responses]
        leaves = [
            given(name, value).detach().requires_grad_() for name, value in zip(names, logps, strict=False)
        ]
        # Each loss depends on its own pair alone, so the gradient of the sum holds all B gradients.
        losses = self(PairLogps(*leaves, *logps[self.responses :]))
        return tuple(-gradient for gradient in torch.autograd.grad(losses.sum(), leaves))


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Direct preference optimisation. Rafailov et al. 2023, Eq. 7.

        loss = -log sigma(z),    z = beta [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ]

    At the start policy and reference are equal, so z = 0 and the loss is ln 2 = 0.6931. The loss depends only
    on the difference, so both log-probs may fall while it improves: watch logps/chosen. With label_smoothing
    it is conservative DPO (Mitchell 2023); robust DPO (Chowdhury et al. 2024) is another loss.
    """

    name, trl, needs_reference, saturates, z_is_logit = "dpo", "sigmoid", True, True, True
    equation, gradient = "-log sigma(z)", "beta * sigma(-z)"

    beta: float = setting(0.1, "strength of the pull towards the reference", positive)
    label_smoothing: float = setting(0.0, "assumed share of swapped labels", smoothing)
    length_normalize: bool = setting(False, "log-ratios per token instead of summed")

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        # r_hat(x, y) = beta log pi(y|x)/pi_ref(y|x), known up to a constant per prompt, which cancels in z.
        chosen, rejected = logps.log_ratios(per_token=self.length_normalize)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, logps: PairLogps) -> Tensor:
        return logistic(self.z(logps), self.label_smoothing)


@dataclass(frozen=True)
class IPO(PreferenceLoss):
    """Identity preference optimisation. Azar et al. 2023, Eq. 17; beta is the paper's tau.

        loss = (h - 1/(2 beta))^2,    h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

    DPO's loss falls with every increase of h; IPO pulls h to 1/(2 beta), and so the margin that is logged,
    beta h, to 0.5. At the start h = 0 and the loss is 1/(4 beta^2). The equation has log-probs summed over
    tokens; the authors ran it with means per token (length_normalize), which need another beta.
    """

    name, trl, needs_reference, unit = "ipo", "ipo", True, "nats²"
    equation, gradient = "(h - 1/(2 beta))^2", "2 (1/(2 beta) - h)"

    beta: float = setting(0.1, "tau: the difference of log-ratios is pulled to 1/(2 beta)", positive)
    length_normalize: bool = setting(False, "log-ratios per token instead of summed")

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        # The paper defines no reward. With beta, these compare with DPO's in the log.
        chosen, rejected = logps.log_ratios(per_token=self.length_normalize)
        return self.beta * chosen, self.beta * rejected

    def z(self, logps: PairLogps) -> Tensor:
        # h. In the paper's equation beta is in the target and not in front of the log-ratios.
        chosen, rejected = logps.log_ratios(per_token=self.length_normalize)
        return chosen - rejected

    def __call__(self, logps: PairLogps) -> Tensor:
        return (self.z(logps) - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """Simple preference optimisation. Meng et al. 2024, Eq. 6.

        loss = -log sigma(z),    z = beta log pi(y_w|x)/|y_w| - beta log pi(y_l|x)/|y_l| - gamma

    The reward is beta times the average log-prob of a token. There is no reference, so only a small learning
    rate keeps the policy near its start. gamma is the target margin. As in the paper, it is not multiplied by
    beta; code that asks for gamma_beta_ratio means gamma / beta.
    """

    name, trl, usual_lr = "simpo", "simpo (CPOTrainer, cpo_alpha=0)", (3e-7, 5e-6)
    saturates = z_is_logit = True
    equation, gradient = "-log sigma(z)", "beta * sigma(-z) / |y|"

    beta: float = setting(2.0, "scale of the reward, which is an average log-prob", positive)
    gamma: float = setting(1.0, "target margin: by how much the chosen reward must be larger", not_negative)
    label_smoothing: float = setting(0.0, "assumed share of swapped labels", smoothing)

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        # A mean and not a sum, so that a response gains nothing by being short.
        chosen, rejected = logps.mean_logps()
        return self.beta * chosen, self.beta * rejected

    def z(self, logps: PairLogps) -> Tensor:
        # By how much the margin of the rewards exceeds the target margin.
        return super().z(logps) - self.gamma

    @property
    def margin_is_logit(self) -> bool:
        return self.gamma == 0  # Else the probabilities of y over y' and of y' over y do not add up to 1.

    def __call__(self, logps: PairLogps) -> Tensor:
        return logistic(self.z(logps), self.label_smoothing)


@dataclass(frozen=True)
class SFT(PreferenceLoss):
    """Supervised fine-tuning on the chosen response: the reference that the other losses start from.

        loss = -log pi(y_w|x) / |y_w|

    The mean is taken over each response's tokens first, so that every response counts alike, long or short.
    """

    name, responses, unit, usual_lr = "sft", 1, "nats per token", (1e-6, 5e-5)
    equation, gradient = "-log pi(y_w|x) / |y_w|", "1 / |y|"

    def z(self, logps: PairLogps) -> Tensor:
        return logps.chosen / given("chosen_length", logps.chosen_length)

    def __call__(self, logps: PairLogps) -> Tensor:
        return -self.z(logps)

    def metrics(self, logps: PairLogps, losses: Tensor) -> dict[str, Tensor]:
        # No rewards and no accuracy, because the rejected response is not computed.
        length = given("chosen_length", logps.chosen_length)
        return {"loss": losses, "logps/chosen": logps.chosen, "response_length/chosen": length}


# The one place where the name of a loss is looked up.
LOSSES: dict[str, type[PreferenceLoss]] = {loss.name: loss for loss in (DPO, IPO, SimPO, SFT)}
