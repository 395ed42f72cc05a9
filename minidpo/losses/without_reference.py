"""Losses that need no reference: SimPO, ORPO and SFT."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from minidpo.losses.inputs import PairLogps, given
from minidpo.losses.preference import Metric, PairLoss, PreferenceLoss, logistic
from minidpo.settings import not_negative, positive, setting, smoothing

# -log P is taken to be at least this, because at P = 1 the odds would be infinite. It is the smallest normal
# float32, so it changes no log-prob but 0 (and subnormal ones).
LEAST_DISTANCE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SimPO(PairLoss):
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
        # A mean, because a sum favours short responses: each token adds a negative log-prob.
        chosen, rejected = logps.mean_logps()
        return self.beta * chosen, self.beta * rejected

    def z(self, logps: PairLogps) -> Tensor:
        # By how much the margin of the rewards exceeds the target margin.
        return super().z(logps) - self.gamma

    def preference(self, logps: PairLogps) -> Tensor:
        return logistic(self.z(logps), self.label_smoothing)


@dataclass(frozen=True)
class ORPO(PairLoss):
    """Odds ratio preference optimisation: SFT and preferences at once. Hong et al. 2024, Eq. 6, 7.

        loss = -sft_weight log P(y_w|x) - lambda_or log sigma(z),    z = log odds(y_w) - log odds(y_l)
        log P(y|x) = log pi(y|x) / |y|,    odds = P / (1 - P)

    P is the geometric mean of the probabilities of a response's tokens, so its odds lie between those of its
    least and its most likely token. There is no reference and no SFT run before: the first term, whose weight
    in the paper is 1, takes its place. With sums in place of means P would be nearly 0, so 1 - P nearly 1,
    and z a difference of sums (docs/derivation.md has the numbers).
    """

    name, usual_lr, z_is_logit = "orpo", (1e-6, 1e-5), True
    equation = "-log P(y_w) - lambda_or log sigma(z)"
    gradient = "(1 + lambda_or sigma(-z) / (1 - P)) / |y|, for y_l without the 1"

    lambda_or: float = setting(0.1, "weight of the preference, -log sigma(log odds ratio)", positive)
    _: KW_ONLY
    sft_weight: float = setting(1.0, "weight of the SFT loss, in the paper 1", not_negative)

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        # The paper has no rewards; log odds are what it compares.
        chosen, rejected = logps.mean_logps()
        return log_odds(chosen), log_odds(rejected)

    def preference(self, logps: PairLogps) -> Tensor:
        return self.lambda_or * logistic(self.z(logps))


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P, exact for P near 1, where 1 - exp(log P) would be rounded to 0."""
    return logp - torch.log(-torch.expm1(logp.clamp(max=-LEAST_DISTANCE)))


@dataclass(frozen=True)
class SFT(PreferenceLoss):
    """Supervised fine-tuning on the chosen response. Most other losses start from its model.

        loss = -log pi(y_w|x) / |y_w|

    The mean is taken over each response's tokens first, so that every response counts alike, long or short.
    """

    name, responses, unit, usual_lr = "sft", 1, "nats per token", (1e-6, 5e-5)
    equation, gradient = "-log pi(y_w|x) / |y_w|", "1 / |y|"

    def z(self, logps: PairLogps) -> Tensor:
        return logps.chosen / given("chosen_length", logps.chosen_length)

    def __call__(self, logps: PairLogps) -> Tensor:
        return -self.z(logps)

    def metrics(self, logps: PairLogps, losses: Tensor) -> dict[str, Metric]:
        # No rewards and no accuracy, because the rejected response is not computed.
        length = given("chosen_length", logps.chosen_length)
        return {"loss": losses, "logps/chosen": logps.chosen, "response_length/chosen": length}
