"""`python -m minidpo exact`: train with every loss in a world where the answer is known, and compare.

What is trained is the project itself: its Transformer, its packed rows, its gatherer, its losses, in float64.
exact_world.py lists the world and derives what must come out; exact_train.py trains, on your own loss too.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidpo.commands.exact_train import (
    Loss,
    Trained,
    train_reward_model,
    train_rlhf,
    train_to_convergence,
)
from minidpo.commands.exact_world import (
    World,
    beats_sampler,
    best_scores,
    divergence,
    expected_reward,
    ipo_minimum,
    label_entropy,
    make_world,
    optimal_policy,
    rlhf_maximum,
    total_variation,
)
from minidpo.commands.figures import COLOURS, INK, MARKS, drawing, require_matplotlib
from minidpo.errors import UserError
from minidpo.losses import dpo_loss, ipo_loss, simpo_loss

TOLERANCE = 1e-5  # total variation; what has converged is some 1e-13 away


class Claim(NamedTuple):
    """A loss, and what it must lead to."""

    name: str
    train: Callable[[], Trained]
    minimum: float
    policy: Tensor  # (X, Y) log-probs
    # A trained reward model's rewards become a policy by the closed form, so that all rows compare alike.
    to_policy: Callable[[Tensor], Tensor] = lambda logps: logps


def claims(world: World, strength: float = 1.0) -> list[Claim]:
    """The rows of the table. `strength` multiplies every beta: great is close to the reference."""
    reference, lengths, rewards, entropy = (
        world.reference_logps, world.lengths, world.rewards, label_entropy(world)
    )  # fmt: skip
    wins = beats_sampler(world)
    smoothed, smoothed_minimum = best_scores(world, label_smoothing=0.1)
    stretched, stretched_minimum = best_scores(world, gamma=1.0)
    beta, beta_averages, beta_ipo, beta_ipo_averages, beta_simpo = (
        strength * at_one for at_one in (0.5, 1.0, 0.2, 0.5, 2.0)
    )
    best = optimal_policy(reference, rewards, beta)
    no_reference = torch.zeros_like(reference)

    def preference(name: str, loss: Loss, minimum: float, policy: Tensor) -> Claim:
        return Claim(name, partial(train_to_convergence, world, loss), minimum, policy)

    return [
        preference("DPO", lambda b: dpo_loss(*b.logps, beta).losses, entropy, best),
        Claim(
            "RLHF objective, policy gradient",
            partial(train_rlhf, world, beta),
            -rlhf_maximum(world, beta),
            best,
        ),
        Claim(
            "reward model, closed form",
            partial(train_reward_model, world),
            entropy,
            best,
            lambda learned: optimal_policy(reference, learned, beta),
        ),
        preference(
            "DPO, smoothing 0.1",
            lambda b: dpo_loss(*b.logps, beta, label_smoothing=0.1).losses,
            smoothed_minimum,
            optimal_policy(reference, smoothed, beta),
        ),
        preference(
            "DPO, averages",
            lambda b: dpo_loss(*b.logps, beta_averages, 0.0, *b.lengths).losses,
            entropy,
            optimal_policy(reference, rewards, beta_averages, lengths),
        ),
        preference(
            "IPO",
            lambda b: ipo_loss(*b.logps, beta_ipo).losses,
            ipo_minimum(world, beta_ipo),
            optimal_policy(reference, wins, beta_ipo),
        ),
        preference(
            "IPO, averages",
            lambda b: ipo_loss(*b.logps, beta_ipo_averages, *b.lengths).losses,
            ipo_minimum(world, beta_ipo_averages),
            optimal_policy(reference, wins, beta_ipo_averages, lengths),
        ),
        preference(
            "SimPO, gamma 0",
            lambda b: simpo_loss(*b.logps[:2], *b.lengths, beta_simpo, gamma=0.0).losses,
            entropy,
            optimal_policy(no_reference, rewards, beta_simpo, lengths),
        ),
        preference(
            "SimPO, gamma 1",
            lambda b: simpo_loss(*b.logps[:2], *b.lengths, beta_simpo, gamma=1.0).losses,
            stretched_minimum,
            optimal_policy(no_reference, stretched, beta_simpo, lengths),
        ),
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo exact",
        description="Train with every loss in a world small enough to list; compare with the derivation.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the reference, the rewards and the sampler"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw reward against KL, training at three strengths (minutes)",
    )
    options = parser.parse_args(arguments)
    if options.plot is not None:
        check_plot(options.plot)
    # Matrices this small: a second thread costs more in waiting than it brings.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        world = make_world(options.seed)
        worst, policies = print_table(world)
        if options.plot is not None:
            plot_frontier(world, policies, options.plot)
            print(f"wrote {options.plot}")
    finally:
        torch.set_num_threads(threads)
    if not worst < TOLERANCE:
        raise SystemExit(
            f"a loss missed its analytic optimum: total variation {worst:.1e}, not below {TOLERANCE:.0e}"
        )


def print_table(world: World) -> tuple[float, list[Tensor]]:
    """Train and print, a row at a time. Returns the greatest total variation, and the log-probs reached."""
    prompts, responses = world.lengths.shape
    weights = sum(p.numel() for p in world.reference.parameters())
    print(
        f"{prompts} prompts, {responses} responses of 1 to {world.lengths.max()} tokens each, all pairs;"
        f" a transformer of {weights} weights, float64"
    )
    print(f"{'loss':<32}{'objective':>15}{'analytic':>15}{'total variation':>17}{'steps':>7}{'seconds':>9}")
    worst, policies = 0.0, []
    for claim in claims(world):
        begin = time.perf_counter()
        trained = claim.train()
        policies.append(claim.to_policy(trained.values))
        distance = total_variation(policies[-1], claim.policy)
        worst = max(worst, distance)
        print(
            f"{claim.name:<32}{trained.objective:>15.10f}{claim.minimum:>15.10f}{distance:>17.1e}"
            f"{trained.steps:>7}{time.perf_counter() - begin:>9.1f}",
            flush=True,
        )
    print(f"greatest total variation {worst:.1e}")
    return worst, policies


def check_plot(file: Path) -> None:
    """Before minutes of training: can the figure be drawn, and written there?"""
    require_matplotlib("--plot")
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {file}: the name must end in .png, .svg or .pdf")
    if not file.resolve().parent.is_dir():
        raise UserError(f"--plot {file}: no such directory as {file.resolve().parent}; make it first")


def plot_frontier(world: World, trained: list[Tensor], file: Path) -> None:
    """Reward against KL, both exact: a curve of each loss's derived optima, marks where training ended.

    No policy lies above the dashed frontier, the most reward that a KL buys; RLHF's optima trace it.
    trained: the policies of `claims(world)`; those at half and at twice their betas are trained here.
    """
    strengths = torch.logspace(-0.7, 1.3, 60).tolist()
    curves = [claims(world, strength) for strength in strengths]
    points = [claims(world, strength) for strength in (0.5, 2.0)]

    def place(policies: list[Tensor]) -> list[list[float]]:
        return [[divergence(world, p) for p in policies], [expected_reward(world, p) for p in policies]]

    with drawing([file], 8, 5.5) as figure:
        axes = figure.subplots()
        for row, (colour, mark) in enumerate(zip(COLOURS, MARKS, strict=True)):
            name = curves[0][row].name
            axes.plot(*place([c[row].policy for c in curves]), color=colour, linewidth=1)
            ends = [c[row].to_policy(c[row].train().values) for c in points]
            look: dict[str, Any] = {"color": colour, "markerfacecolor": "none", "markersize": 8}
            axes.plot(*place([trained[row], *ends]), mark, label=name, **look)
        axes.plot(*place([c[0].policy for c in curves]), "--", color=INK, linewidth=2, label="frontier")
        axes.set(xlabel="KL(policy, reference), nats", ylabel="expected true reward, nats")
        axes.set_title("Exact reward and KL at each optimum")
        axes.legend(fontsize=8)
