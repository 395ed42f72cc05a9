"""IPO, Azar et al. 2023, Eq. 17: summed log-ratios, and log-ratios per token."""

from minidpo.verify.claims import OF_THE_DIFFERENCE, PAIR, START, Claims, margin, of_margin
from minidpo.verify.exact_world import beats_sampler, optimal_policy


def distance(p, s):
    """h - 1/(2 beta)"""
    return margin(p, s.length_normalize) - 1 / (2 * s.beta)


def gradient(p, s):
    """d loss / d h = 2 (h - 1/(2 beta)), which is 0 at the target; d h / d log pi = +-1, or +-1 / |y|."""
    return of_margin(p, 2 * distance(p, s), s.length_normalize)


def optimum(world, s):
    """g(y) = p*(y beats mu) / beta + a constant (docs/derivation.md, section 4), or g(y) / |y|. A difference
    of these is not what a single pair asks for, so the answer depends on mu, unlike DPO's."""
    lengths = world.lengths if s.length_normalize else None
    return optimal_policy(world.reference_logps, beats_sampler(world), s.beta, lengths)


CLAIMS = Claims(
    points=[
        # PAIR has log-ratios of 3 and -1, so h = 4; beta = 0.1 by default, so the target is 1/(2 * 0.1) = 5
        (dict(), PAIR, 1.0),  # (4 - 5)^2
        (dict(beta=0.5), PAIR, 9.0),  # 1/(2 * 0.5) = 1; (4 - 1)^2
        (dict(), START, 25.0),  # h = 0: 1/(4 * 0.1^2)
        (dict(length_normalize=True), PAIR, 16.4025),  # per token 3/4 and -1/5, so h = 0.95; (0.95 - 5)^2
        (dict(sft_weight=0.5), PAIR, 2.25),  # 0.5 * 10 / 4 = 1.25 more than the first
    ],
    twin=lambda p, s: distance(p, s) ** 2,
    gradient=gradient,
    # (-h - 1/(2 beta))^2 - (h - 1/(2 beta))^2
    mirror=lambda p, s: 2 * margin(p, s.length_normalize) / s.beta,
    unmoved=OF_THE_DIFFERENCE,
    optimum=optimum,
    optima={"IPO": dict(beta=0.2), "IPO, averages": dict(beta=0.5, length_normalize=True)},
)
