"""`python -m minidpo exact`: train each loss that has an optimum in a world where it is known, and compare.

What is trained is the project itself: its transformer, packed rows, log-probs and losses, in float64.
verify/exact_world.py lists the world, claims/ derives what must come out, exact_train.py trains.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from minidpo.verify.claims import claims_of, every_loss
from minidpo.verify.draws import one_thread
from minidpo.verify.exact_train import (
    Trained,
    population_loss,
    reward_loss,
    rlhf_loss,
    train_reward_model,
    train_rlhf,
    train_to_convergence,
)
from minidpo.verify.exact_world import World, make_world, optimal_policy, total_variation

TOLERANCE = 1e-5  # total variation; what has converged is some 1e-13 away
BETA = 0.5  # of RLHF


class Row(NamedTuple):
    """A loss, and what it must lead to."""

    name: str
    train: Callable[[], Trained]
    minimum: float
    policy: Tensor  # (X, Y) log-probs


def table(world: World) -> list[Row]:
    """The rows: every optimum that is claimed, then RLHF in two stages."""
    rows = []
    for kind in every_loss().values():
        claims = claims_of(kind)
        for name, settings in claims.optima.items():
            loss = kind(**settings)
            policy = claims.optimum(world, loss)  # type: ignore[operator]
            minimum = population_loss(world, loss, policy).item()
            rows.append(Row(name, partial(train_to_convergence, world, loss), minimum, policy))

    policy = optimal_policy(world.reference_logps, world.rewards, BETA)
    rlhf, reward_model = (partial(train, world, BETA) for train in (train_rlhf, train_reward_model))
    return [
        *rows,
        Row("RLHF objective, policy gradient", rlhf, rlhf_loss(world, BETA, policy).item(), policy),
        Row("reward model, closed form", reward_model, reward_loss(world, world.rewards).item(), policy),
    ]


@one_thread()
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo exact",
        description="Train with each loss that has an optimum with gradient 0 (`verify NAME` says why one has"
        " none), in a world small enough to list; compare with the derivation.",
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the reference, the rewards, the sampler")
    world = make_world(parser.parse_args(arguments).seed)
    prompts, responses = world.lengths.shape
    weights = sum(p.numel() for p in world.reference.parameters())
    print(
        f"{prompts} prompts, {responses} responses of 1 to {world.lengths.max()} tokens each, all pairs;"
        f" a transformer of {weights} weights, float64"
    )
    print(f"{'loss':<32}{'objective':>15}{'analytic':>15}{'total variation':>17}{'steps':>7}{'seconds':>9}")
    distances = []
    for row in table(world):
        begin = time.perf_counter()
        trained = row.train()
        distances.append(total_variation(trained.values, row.policy))
        print(
            f"{row.name:<32}{trained.objective:>15.10f}{row.minimum:>15.10f}{distances[-1]:>17.1e}"
            f"{trained.steps:>7}{time.perf_counter() - begin:>9.1f}",
            flush=True,
        )
    worst = np.max(distances)  # NaN if one is
    print(f"greatest total variation {worst:.1e}")
    if not worst < TOLERANCE:
        raise SystemExit(
            f"a loss missed its analytic optimum: total variation {worst:.1e}, not below {TOLERANCE:.0e}"
        )
