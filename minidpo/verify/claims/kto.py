"""KTO, Ethayarajh et al. 2024: one labelled response, compared with a reference point z0 that is given."""

import numpy as np

from minidpo.verify.claims import Claims, shifted, sigma

LIKED = dict(chosen=-10, ref_chosen=-13, z0=1.0, label=True, chosen_length=4)  # its log-ratio is 3
DISLIKED = LIKED | dict(label=False)


def sign(p):
    return np.where(p.label, 1.0, -1.0)


def z(p, s):
    return sign(p) * s.beta * (p.chosen - p.ref_chosen - p.z0)


def weight(p, s):
    return np.where(p.label, s.lambda_d, s.lambda_u)


def gradient(p, s):
    """d loss / d z = -lambda sigma(z) sigma(-z); z0 and the reference oppose the policy."""
    slope = -weight(p, s) * sigma(z(p, s)) * sigma(-z(p, s)) * sign(p) * s.beta
    return dict(chosen=slope, ref_chosen=-slope, z0=-slope)


CLAIMS = Claims(
    points=[
        (dict(), LIKED, 0.4501660027),  # z = 0.1 * (3 - 1) = 0.2; 1 - sigma(0.2)
        (dict(), DISLIKED, 0.5498339973),  # z = -0.2; 1 - sigma(-0.2)
        (dict(), LIKED | dict(ref_chosen=-10, z0=0.0), 0.5),  # the start: 1 - sigma(0)
        (dict(lambda_d=1.5, lambda_u=4.0), LIKED, 0.6752490040),  # 1.5 * 0.4501660027
        (dict(lambda_d=1.5, lambda_u=4.0), DISLIKED, 2.1993359892),  # 4 * 0.5498339973
        (dict(beta=0.5), DISLIKED, 0.7310585786),  # z = -0.5 * 2 = -1; sigma(1)
    ],
    twin=lambda p, s: weight(p, s) * (1 - sigma(z(p, s))),
    gradient=gradient,
    unmoved={
        "the same number added to policy and reference": shifted("chosen", "ref_chosen"),
        "the same number added to the log-ratio and z0": shifted("chosen", "z0"),
        "another rejected response": shifted("rejected", "ref_rejected"),
    },
    optimum="none: mass moved to responses that are desirable more often than not, from the others, always"
    " lowers the loss, so its limit is at probability 0 (docs/derivation.md)",
)
