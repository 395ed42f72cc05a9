"""Robust DPO, Chowdhury et al. 2024: DPO's loss of clean labels, from labels with a share e swapped."""

from minidpo.verify.claims import OF_THE_DIFFERENCE, PAIR, START, Claims, logistic, margin, of_margin, sigma
from minidpo.verify.exact_world import optimal_policy


def twin(p, s):
    z, e = s.beta * margin(p), s.flip_rate
    return ((1 - e) * logistic(z) - e * logistic(-z)) / (1 - 2 * e)


def gradient(p, s):
    """d loss / d z = (-(1-e) sigma(-z) - e sigma(z)) / (1-2e) = -sigma(-z) - e / (1-2e)."""
    return of_margin(p, -s.beta * (sigma(-s.beta * margin(p)) + s.flip_rate / (1 - 2 * s.flip_rate)))


CLAIMS = Claims(
    points=[
        # PAIR has z = 0.1 * 4 = 0.4, and e = 0.1: (0.9 * 0.5130152524 - 0.1 * 0.9130152524) / 0.8
        (dict(), PAIR, 0.4630152524),
        (dict(), START, 0.6931471806),  # z = 0: ln 2 (1-e - e) / (1-2e) = ln 2
        (dict(beta=0.25, flip_rate=0.0), PAIR, 0.3132616875),  # DPO's: z = 1; ln(1 + exp(-1))
        (dict(sft_weight=0.5), PAIR, 1.7130152524),  # 0.5 * 10 / 4 = 1.25 more than the first
    ],
    twin=twin,
    gradient=gradient,
    mirror=lambda p, s: s.beta * margin(p) / (1 - 2 * s.flip_rate),  # ((1-e) z + e z) / (1-2e)
    unmoved=OF_THE_DIFFERENCE,
    # DPO's of clean labels. The world swaps as many of them as the loss assumes.
    optimum=lambda world, s: optimal_policy(world.reference_logps, world.rewards, s.beta),
    optima={"robust DPO, 10 % swapped": dict(beta=0.5, flip_rate=0.1)},
)
