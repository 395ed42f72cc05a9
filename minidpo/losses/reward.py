"""The reward model's loss: Bradley-Terry on the rewards of both responses, and its two regularisers."""

from dataclasses import dataclass

from torch import Tensor

from minidpo.losses.inputs import Rewards, given
from minidpo.losses.preference import logistic
from minidpo.settings import check_fields, not_negative, setting, smoothing


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """-log sigma(r(x, y_w) - r(x, y_l) - margin), with label smoothing as in DPO. Bradley & Terry 1952.

    Shapes: chosen and rejected (B,), margin a number or (B,); returns (B,), nats. The target margin, by which
    the chosen reward must be larger, is that of Llama 2 (Touvron et al. 2023, Eq. 2).
    """
    return logistic(chosen - rejected - margin, label_smoothing)


@dataclass(frozen=True)
class BradleyTerry:
    """What a reward model is trained with. Ouyang et al. 2022, Eq. 1, with two regularisers.

        loss = -log sigma(r_w - r_l - margin) + lm_weight * NLL per token of y_w
                                              + center_weight * (r_w + r_l)^2

    NLL: the negative log-likelihood -log pi(y_w|x). With its term, the network below the reward head
    remains a language model. Bradley-Terry depends only on differences of rewards, so all rewards may drift
    together; the centring term (Eisenstein et al. 2023) keeps their sum near 0.
    """

    # As in preference.py. The warnings of a run read name, usual_lr and needs_reference.
    name = "reward model"
    equation, unit, usual_lr = "-log sigma(r_w - r_l - margin)", "nats", (1e-6, 5e-5)
    needs_reference, responses, unpaired, needs_z0 = False, 2, False, False

    lm_weight: float = setting(
        1.0, "weight of the language-modelling loss on the chosen response", not_negative
    )
    margin: float = setting(0.0, "target margin: by how much the chosen reward must be larger", not_negative)
    margin_from_data: bool = setting(
        False, "add each record's margin (or score_chosen - score_rejected) to the target margin"
    )
    center_weight: float = setting(0.0, "weight of (r_chosen + r_rejected)^2", not_negative)
    label_smoothing: float = setting(0.0, "assumed share of swapped labels", smoothing)

    def __post_init__(self) -> None:
        check_fields(self.name, self)

    def preference(self, rewards: Rewards) -> Tensor:
        """The Bradley-Terry term alone, (B,)."""
        # The target margin of a pair: that of the settings, plus that of its record.
        margin = self.margin + given("margin", rewards.margin) if self.margin_from_data else self.margin
        return bradley_terry(rewards.chosen, rewards.rejected, margin, self.label_smoothing)

    def language_modelling(self, rewards: Rewards) -> Tensor:
        """-log pi(y_w|x) / |y_w|, as in SFT, (B,)."""
        return -given("chosen_logps", rewards.chosen_logps) / given("chosen_length", rewards.chosen_length)

    def __call__(self, rewards: Rewards) -> Tensor:
        """B losses, differentiable in rewards and log-probs."""
        # Term by term, in the order of the equation. A weight of 0 leaves out the computation too: the
        # log-probs are then None, because nobody asked the model for them.
        losses = self.preference(rewards)
        if self.center_weight:
            losses = losses + self.center_weight * (rewards.chosen + rewards.rejected).square()
        if self.lm_weight:
            losses = losses + self.lm_weight * self.language_modelling(rewards)
        return losses

    def metrics(self, rewards: Rewards, losses: Tensor) -> dict[str, Tensor]:
        """What is logged about each pair, (B,) each."""
        chosen, rejected = rewards.chosen, rewards.rejected
        values = {
            "loss": losses,
            # The Bradley-Terry term by itself compares with ln 2 = 0.6931, the loss of equal rewards.
            "preference_loss": self.preference(rewards),
            # Strictly greater: equal rewards are no win.
            "accuracy": chosen > rejected,
            "margin": chosen - rejected,  # The difference of rewards, not the target margin.
            # Only the centring term keeps this one from drifting.
            "mean_reward": (chosen + rejected) / 2,
        }
        return values | ({"lm_loss": self.language_modelling(rewards)} if self.lm_weight else {})
