"""`python -m minidpo exact`: train with every loss in a world where the answer is known, and compare.

What is trained is the project itself: its transformer, packed rows, log-probs and losses, in float64.
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

from minidpo.errors import UserError
from minidpo.files import require_regular
from minidpo.losses import DPO, IPO, ORPO, PairLogps, RobustDPO, SimPO
from minidpo.tools.figures import COLOURS, INK, MARKS, drawing, require_matplotlib
from minidpo.verify.exact_train import Trained, train_reward_model, train_rlhf, train_to_convergence
from minidpo.verify.exact_world import (
    World,
    beats_sampler,
    divergence,
    expected_reward,
    ipo_minimum,
    label_entropy,
    make_world,
    optimal_policy,
    rlhf_maximum,
    total_variation,
)
from minidpo.verify.optima import best_of_odds, best_scores, best_with_sft

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
    """The rows of the table. `strength` multiplies every beta: a great one keeps close to the reference."""
    s, reference, lengths, rewards = strength, world.reference_logps, world.lengths, world.rewards
    wins, entropy, no_reference = beats_sampler(world), label_entropy(world), torch.zeros_like(reference)
    smoothed, smoothed_minimum = best_scores(world, label_smoothing=0.1)
    stretched, stretched_minimum = best_scores(world, gamma=1.0)
    best = partial(optimal_policy, reference, beta=0.5 * s)

    def row(
        name: str,
        loss: DPO | IPO | SimPO,
        minimum: float,
        scores: Tensor,
        lengths: Tensor | None = None,
        base: Tensor = reference,
    ) -> Claim:
        policy = optimal_policy(base, scores, loss.beta, lengths)
        return Claim(name, partial(train_to_convergence, world, loss), minimum, policy)

    rlhf, reward_model = partial(train_rlhf, world, 0.5 * s), partial(train_reward_model, world)
    mixed, odds, robust = (
        DPO(0.5 * s, sft_weight=0.5),
        ORPO(lambda_or=1.0 / s),
        RobustDPO(0.5 * s, flip_rate=0.1),
    )
    mixed_policy, mixed_minimum = best_with_sft(world, mixed.beta, mixed.sft_weight)
    odds_policy, odds_minimum = best_of_odds(world, odds.lambda_or)

    def swapped(logps: PairLogps) -> Tensor:
        """The robust loss of labels that are swapped as often as it assumes."""
        other = PairLogps(logps.rejected, logps.chosen, logps.ref_rejected, logps.ref_chosen)
        return (1 - robust.flip_rate) * robust(logps) + robust.flip_rate * robust(other)

    ipo, ipo_averages = IPO(0.2 * s), IPO(0.5 * s, length_normalize=True)
    return [
        row("DPO", DPO(0.5 * s), entropy, rewards),
        Claim("RLHF objective, policy gradient", rlhf, -rlhf_maximum(world, 0.5 * s), best(rewards)),
        Claim("reward model, closed form", reward_model, entropy, best(rewards), best),
        row("DPO, smoothing 0.1", DPO(0.5 * s, label_smoothing=0.1), smoothed_minimum, smoothed),
        row("DPO, averages", DPO(1.0 * s, length_normalize=True), entropy, rewards, lengths),
        row("IPO", ipo, ipo_minimum(world, ipo.beta), wins),
        row("IPO, averages", ipo_averages, ipo_minimum(world, ipo_averages.beta), wins, lengths),
        row("SimPO, gamma 0", SimPO(2.0 * s, gamma=0.0), entropy, rewards, lengths, no_reference),
        row("SimPO, gamma 1", SimPO(2.0 * s, gamma=1.0), stretched_minimum, stretched, lengths, no_reference),
        Claim(
            "robust DPO, 10 % swapped", partial(train_to_convergence, world, swapped), entropy, best(rewards)
        ),
        Claim(
            "DPO, SFT weight 0.5", partial(train_to_convergence, world, mixed), mixed_minimum, mixed_policy
        ),
        Claim("ORPO", partial(train_to_convergence, world, odds), odds_minimum, odds_policy),
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo exact",
        description="Train with every loss in a world small enough to list; compare with the derivation.",
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
    # For matrices this small a second thread costs more in waiting than it brings.
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
    """Train and print, row by row. Returns the greatest total variation, and the log-probs reached."""
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


def plot_frontier(world: World, trained: list[Tensor], file: Path) -> None:
    """Reward against KL, both exact: a curve of each loss's derived optima, marks where training ended.

    No policy lies above the dashed frontier, the most reward that a KL buys; RLHF's optima trace it.
    trained: the policies of `claims(world)`; those at half and at twice their betas are trained here.
    """
    strengths = torch.logspace(-0.7, 1.3, 60).tolist()
    curves = [claims(world, strength) for strength in strengths]
    points = [claims(world, strength) for strength in (0.5, 2.0)]

    def coordinates(policies: list[Tensor]) -> list[list[float]]:
        return [[divergence(world, p) for p in policies], [expected_reward(world, p) for p in policies]]

    with drawing([file], 8, 5.5) as figure:
        axes = figure.subplots()
        for row, name in enumerate(claim.name for claim in curves[0]):
            # The colours come again before a pair of colour and mark does.
            colour, mark = COLOURS[row % len(COLOURS)], MARKS[(row + row // len(COLOURS)) % len(MARKS)]
            axes.plot(*coordinates([c[row].policy for c in curves]), color=colour, linewidth=1)
            ends = [c[row].to_policy(c[row].train().values) for c in points]
            look: dict[str, Any] = {"color": colour, "markerfacecolor": "none", "markersize": 8}
            axes.plot(*coordinates([trained[row], *ends]), mark, label=name, **look)
        axes.plot(*coordinates([c[0].policy for c in curves]), "--", color=INK, linewidth=2, label="frontier")
        axes.set(xlabel="KL(policy, reference), nats", ylabel="expected true reward, nats")
        axes.set_title("Exact reward and KL at each optimum")
        axes.legend(fontsize=8)
