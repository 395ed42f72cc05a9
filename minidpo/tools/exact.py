"""`python -m minidpo exact`: train each loss that has an optimum in a world where it is known, and compare.

What is trained is the project itself: its transformer, packed rows, log-probs and losses, in float64.
verify/exact_world.py lists the world, claims/ derives what must come out, exact_train.py trains.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidpo.errors import UserError
from minidpo.files import require_regular
from minidpo.tools.figures import COLOURS, INK, MARKS, drawing, require_matplotlib
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
from minidpo.verify.exact_world import World, divergence, expected_reward, make_world, total_variation
from minidpo.verify.optima import optimal_policy

TOLERANCE = 1e-5  # total variation; what has converged is some 1e-13 away


class Row(NamedTuple):
    """A loss, and what it must lead to."""

    name: str
    train: Callable[[], Trained]
    minimum: float
    policy: Tensor  # (X, Y) log-probs


def table(world: World, strength: float = 1.0) -> list[Row]:
    """The rows: every optimum that is claimed, then RLHF in two stages. `strength` multiplies every beta, and
    divides ORPO's lambda: a great one keeps close to the reference, or to SFT."""
    rows, factors = [], {"beta": strength, "lambda_or": 1 / strength}
    for kind in every_loss().values():
        claims = claims_of(kind)
        for name, settings in claims.optima.items():
            loss = kind(**settings)
            scaled = {
                key: factor * getattr(loss, key) for key, factor in factors.items() if hasattr(loss, key)
            }
            loss = replace(loss, **scaled)
            policy = claims.optimum(world, loss)  # type: ignore[operator]
            minimum = population_loss(world, loss, policy).item()
            rows.append(Row(name, partial(train_to_convergence, world, loss), minimum, policy))

    beta = 0.5 * strength
    best = partial(optimal_policy, world.reference_logps, beta=beta)
    policy, rlhf = best(world.rewards), partial(train_rlhf, world, beta)

    def reward_model() -> Trained:
        trained = train_reward_model(world)
        return trained._replace(values=best(trained.values))  # By the closed form its rewards are a policy.

    return [
        *rows,
        Row("RLHF objective, policy gradient", rlhf, rlhf_loss(world, beta, policy).item(), policy),
        Row("reward model, closed form", reward_model, reward_loss(world, world.rewards).item(), policy),
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo exact",
        description="Train with each loss that has an optimum to be reached (not KTO, APO-zero and hinge), in"
        " a world small enough to list; compare with the derivation.",
    )
    draws = "draws the reference, the rewards and the sampler"
    parser.add_argument("--seed", type=int, default=0, help=draws)
    draw = "draw reward against KL, training at three strengths (minutes)"
    parser.add_argument("--plot", type=Path, metavar="FILE", help=draw)
    options = parser.parse_args(arguments)
    if options.plot is not None:  # Fail now rather than after minutes of training.
        if options.plot.suffix not in (".png", ".svg", ".pdf"):
            raise UserError(f"--plot {options.plot}: the name must end in .png, .svg or .pdf")
        require_regular(options.plot, "--plot ")
        require_matplotlib("--plot")
    with one_thread():
        world = make_world(options.seed)
        worst, policies = print_table(world)
        if options.plot is not None:
            plot_frontier(world, policies, options.plot)
            print(f"wrote {options.plot}")
    if not worst < TOLERANCE:
        raise SystemExit(
            f"a loss missed its analytic optimum: total variation {worst:.1e}, not below {TOLERANCE:.0e}"
        )


def print_table(world: World) -> tuple[float, list[Tensor]]:
    """Train and print, row by row. Returns the greatest total variation, and the log-probs reached."""
    prompts, responses = world.lengths.shape
    weights = sum(p.numel() for p in world.reference.parameters())
    print(
        f"{prompts} prompts, {responses} responses of 1 to {world.lengths.max()} tokens each, all pairs;"
        f" a transformer of {weights} weights, float64"
    )
    print(f"{'loss':<32}{'objective':>15}{'analytic':>15}{'total variation':>17}{'steps':>7}{'seconds':>9}")
    worst, policies = 0.0, []
    for row in table(world):
        begin = time.perf_counter()
        trained = row.train()
        policies.append(trained.values)
        distance = total_variation(trained.values, row.policy)
        worst = max(worst, distance)
        print(
            f"{row.name:<32}{trained.objective:>15.10f}{row.minimum:>15.10f}{distance:>17.1e}"
            f"{trained.steps:>7}{time.perf_counter() - begin:>9.1f}",
            flush=True,
        )
    print(f"greatest total variation {worst:.1e}")
    return worst, policies


def plot_frontier(world: World, trained: list[Tensor], file: Path) -> None:
    """Reward against KL, both exact: a curve of each loss's derived optima, marks where training ended.

    No policy lies above the dashed frontier, the most reward that a KL buys; DPO's optima trace it.
    trained: the policies of `table(world)`; those at half and at twice their betas are trained here.
    """
    tables = [table(world, strength) for strength in torch.logspace(-0.7, 1.3, 60).tolist()]
    marked = [table(world, strength) for strength in (0.5, 2.0)]

    def coordinates(policies: list[Tensor]) -> list[list[float]]:
        return [[divergence(world, p) for p in policies], [expected_reward(world, p) for p in policies]]

    with drawing([file], 8, 5.5) as figure:
        axes = figure.subplots()
        for i, (row, *others) in enumerate(zip(*tables, strict=True)):
            # The colours come again before a pair of colour and mark does.
            colour, mark = COLOURS[i % len(COLOURS)], MARKS[(i + i // len(COLOURS)) % len(MARKS)]
            axes.plot(*coordinates([r.policy for r in (row, *others)]), color=colour, linewidth=1)
            ends = [rows[i].train().values for rows in marked]
            look: dict[str, Any] = {"color": colour, "markerfacecolor": "none", "markersize": 8}
            axes.plot(*coordinates([trained[i], *ends]), mark, label=row.name, **look)
        axes.plot(*coordinates([t[0].policy for t in tables]), "--", color=INK, linewidth=2, label="frontier")
        axes.set(xlabel="KL(policy, reference), nats", ylabel="expected true reward, nats")
        axes.set_title("Exact reward and KL at each optimum")
        axes.legend(fontsize=8)
