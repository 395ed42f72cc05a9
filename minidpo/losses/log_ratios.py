"""Losses of the log-ratios of two responses: DPO, IPO, robust DPO, hinge and APO-zero."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minidpo.losses.inputs import PairLogps, given
from minidpo.losses.preference import PairLoss, logistic
from minidpo.settings import positive, setting, smoothing


@dataclass(frozen=True)
class LogRatioLoss(PairLoss):
    """What the losses of this file share: DPO's implicit reward, beta times the log-ratio."""

    needs_reference = True
    length_normalize = False  # whether log-ratios are means over tokens; a setting of DPO and IPO

    beta: float = setting(0.1, "strength of the pull towards the reference", positive)

    def rewards(self, logps: PairLogps) -> tuple[Tensor, Tensor]:
        # r_hat(x, y) = beta log pi(y|x)/pi_ref(y|x), known up to a constant per prompt, which cancels in z.
        chosen, rejected = logps.log_ratios(per_token=self.length_normalize)
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True)
class DPO(LogRatioLoss):
    """Direct preference optimisation. Rafailov et al. 2023, Eq. 7.

        loss = -log sigma(z),    z = beta [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x) ]

    At the start policy and reference are equal, so z = 0 and the loss is ln 2 = 0.6931. The loss depends only
    on the difference, so both log-probs may fall while it improves: watch logps/chosen. With label_smoothing
    it is conservative DPO (Mitchell 2023). With margin_from_data it is ODPO (Amini et al. 2024): the record's
    margin is subtracted from z, so that a response that is much better must become much likelier.
    """

    name, trl, saturates, z_is_logit = "dpo", "sigmoid", True, True
    equation, gradient = "-log sigma(z)", "beta * sigma(-z)"

    label_smoothing: float = setting(0.0, "assumed share of swapped labels", smoothing)
    length_normalize: bool = setting(False, "log-ratios per token instead of summed")
    margin_from_data: bool = setting(
        False, "subtract each record's margin (or score_chosen - score_rejected) from z"
    )

    def z(self, logps: PairLogps) -> Tensor:
        z = super().z(logps)
        return z - given("margin", logps.margin) if self.margin_from_data else z

    def preference(self, logps: PairLogps) -> Tensor:
        return logistic(self.z(logps), self.label_smoothing)


@dataclass(frozen=True)
class IPO(LogRatioLoss):
    """Identity preference optimisation. Azar et al. 2023, Eq. 17; beta is the paper's tau.

        loss = (h - 1/(2 beta))^2,    h = log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)

    DPO's loss falls with every increase of h; IPO pulls h to 1/(2 beta), and so the margin that is logged,
    beta h, to 0.5. At the start h = 0 and the loss is 1/(4 beta^2). The equation has log-probs summed over
    tokens; the authors ran it with means per token (length_normalize), which need another beta.
    """

    name, trl, unit = "ipo", "ipo", "nats²"
    equation, gradient = "(h - 1/(2 beta))^2", "2 (1/(2 beta) - h)"

    beta: float = setting(0.1, "tau: the difference of log-ratios is pulled to 1/(2 beta)", positive)
    length_normalize: bool = setting(False, "log-ratios per token instead of summed")

    def z(self, logps: PairLogps) -> Tensor:
        # h. In the paper's equation beta is in the target and not in front of the log-ratios. The paper
        # defines no reward. DPO's rewards are logged, so that runs of both losses can be compared.
        chosen, rejected = logps.log_ratios(per_token=self.length_normalize)
        return chosen - rejected

    def preference(self, logps: PairLogps) -> Tensor:
        return (self.z(logps) - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class RobustDPO(LogRatioLoss):
    """DPO for labels of which a share e (flip_rate) is swapped. Chowdhury et al. 2024.

        loss = ( -(1-e) log sigma(z) + e log sigma(-z) ) / (1 - 2e),    z as in DPO

    Averaged over a pair (share 1-e) and the same pair with its label swapped (share e), the loss is DPO's: so
    it ends where DPO would end on the labels before some were swapped. Conservative DPO, DPO's
    label_smoothing, ends at smaller margins.
    """

    name, trl, z_is_logit = "robust", "robust", True
    equation, gradient = "(-(1-e) log sigma(z) + e log sigma(-z)) / (1-2e)", "beta (sigma(-z) + e / (1-2e))"

    flip_rate: float = setting(0.1, "share of swapped labels", smoothing)

    def preference(self, logps: PairLogps) -> Tensor:
        # Unbiased under swapped labels: (1-e) times this plus e times the same of -z is -log sigma(z).
        z, e = self.z(logps), self.flip_rate
        return ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge(LogRatioLoss):
    """The hinge loss of SLiC, Zhao et al. 2023, on the margin of DPO, as in RSO, Liu et al. 2024.

        loss = max(0, 1 - z),    z as in DPO

    A pair whose margin has reached 1 has loss and gradient 0. SLiC itself compares log-probs without a
    reference. RSO writes gamma for beta.
    """

    name, trl, saturates = "hinge", "hinge", True
    equation, gradient = "max(0, 1 - z)", "beta if z < 1, else 0"

    def preference(self, logps: PairLogps) -> Tensor:
        return torch.relu(1 - self.z(logps))


@dataclass(frozen=True)
class APOZero(LogRatioLoss):
    """Anchored preference optimisation, "zero". D'Oosterlinck et al. 2024, Eq. 7.

        loss = 1 - sigma(r_w) + sigma(r_l),    r = beta log pi(y|x)/pi_ref(y|x)

    Each response is compared with the reference and not with the other one: the chosen one shall become
    likelier than it was, the rejected one less likely. DPO's loss asks for their difference only.
    """

    name, trl, unit = "apo_zero", "apo_zero", "shares"
    equation, gradient = "1 - sigma(r_w) + sigma(r_l)", "beta sigma(r) sigma(-r)"

    def preference(self, logps: PairLogps) -> Tensor:
        chosen, rejected = self.rewards(logps)
        # 1 - sigma(r) = sigma(-r), without the rounding of a difference.
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)
