"""SFT: the mean log-prob of the chosen response's tokens."""

from minidpo.verify.claims import Claims
from minidpo.verify.exact_world import beats_sampler


def optimum(world, s):
    """y wins mu(y) p*(y beats mu) of the pairs. With w(y) that number over |y|, the loss is the sum of
    -w(y) log pi(y), which is least at pi = w / sum of w."""
    return (world.sampler * beats_sampler(world) / world.lengths).log().log_softmax(-1)


CLAIMS = Claims(
    points=[(dict(), dict(chosen=-10, chosen_length=4), 2.5)],  # 10 / 4
    twin=lambda p, s: -p.chosen / p.chosen_length,
    gradient=lambda p, s: dict(chosen=-1 / p.chosen_length),
    optimum=optimum,
    optima={"SFT": dict()},
)
