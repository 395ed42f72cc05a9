"""The hinge loss of SLiC, Zhao et al. 2023, on the margin of DPO."""

import numpy as np

from minidpo.verify.claims import OF_THE_DIFFERENCE, PAIR, START, Claims, margin, of_margin

CLAIMS = Claims(
    points=[
        (dict(), PAIR, 0.6),  # z = 0.1 * (3 - -1) = 0.4; 1 - 0.4
        (dict(beta=0.3), PAIR, 0.0),  # z = 1.2, beyond 1
        (dict(), START, 1.0),  # z = 0
        (dict(sft_weight=0.5), PAIR, 1.85),  # 0.5 * 10 / 4 = 1.25 more than the first
    ],
    twin=lambda p, s: np.maximum(0, 1 - s.beta * margin(p)),
    gradient=lambda p, s: of_margin(p, np.where(s.beta * margin(p) < 1, -s.beta, 0.0)),
    unmoved=OF_THE_DIFFERENCE,
    optimum="the expected loss is made of straight lines, so its least value lies at a kink: gradient descent"
    " steps to and fro across it, and second derivatives are 0 or not there",
)
