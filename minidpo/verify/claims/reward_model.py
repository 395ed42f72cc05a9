"""The reward model's loss: Bradley-Terry, margins, label smoothing, language modelling and centring."""

from minidpo.losses import Rewards
from minidpo.verify.claims import Claims, logistic, shifted, sigma

APART = dict(chosen=1.5, rejected=0.5, margin=0.25, chosen_logps=-10, chosen_length=4)
ALIKE = APART | dict(chosen=-3, rejected=-3)
NO_LM = dict(lm_weight=0.0)
EVERYTHING = dict(lm_weight=0.5, margin=0.5, margin_from_data=True, center_weight=0.5, label_smoothing=0.1)


def z(p, s):
    return p.chosen - p.rejected - s.margin - s.margin_from_data * p.margin


def twin(p, s):
    losses = logistic(z(p, s), s.label_smoothing) + s.center_weight * (p.chosen + p.rejected) ** 2
    return losses - s.lm_weight * p.chosen_logps / p.chosen_length


def gradient(p, s):
    """d loss / d z = sigma(z) - (1-e), as in DPO; the centring term adds 2 (r_w + r_l) to both rewards."""
    slope = sigma(z(p, s)) - (1 - s.label_smoothing)
    center = s.center_weight * 2 * (p.chosen + p.rejected)
    of_rewards = dict(chosen=slope + center, rejected=-slope + center)
    return of_rewards | dict(margin=-slope * s.margin_from_data, chosen_logps=-s.lm_weight / p.chosen_length)


CLAIMS = Claims(
    points=[
        (NO_LM, APART, 0.3132616875),  # z = 1.5 - 0.5 = 1; ln(1 + exp(-1)) = ln 1.3678794412
        (NO_LM, ALIKE, 0.6931471806),  # z = 0; ln 2
        (NO_LM | dict(margin=0.5), APART, 0.4740769842),  # z = 1 - 0.5; ln(1 + exp(-0.5))
        (NO_LM | dict(margin=0.5, label_smoothing=0.1), APART, 0.5240769842),  # e z = 0.1 * 0.5 more
        (NO_LM | dict(margin_from_data=True), APART, 0.3868710061),  # z = 1 - 0.25; ln(1 + exp(-0.75))
        (NO_LM | dict(margin_from_data=True, margin=0.5), APART, 0.5759394199),  # z = 1 - 0.25 - 0.5
        (NO_LM | dict(center_weight=0.5), APART, 2.3132616875),  # 0.5 (1.5 + 0.5)^2 = 2 more
        (NO_LM | dict(center_weight=1.0), ALIKE, 36.6931471806),  # (-3 - 3)^2 = 36 more
        (dict(), APART, 2.8132616875),  # -(-10) / 4 = 2.5 more, because lm_weight = 1 by default
        (dict(lm_weight=0.5), APART, 1.5632616875),  # 0.5 * 2.5 = 1.25 more
        # z = 1 - 0.25 - 0.5 = 0.25: 0.5759394199, and e z = 0.025, 2 and 1.25 more
        (EVERYTHING, APART, 3.8509394199),
    ],
    twin=twin,
    gradient=gradient,
    unmoved={"the same number added to both rewards": shifted("chosen", "rejected")},
    optimum="a reward and not a policy: `python -m minidpo exact` trains it",
    fields=Rewards,
)
