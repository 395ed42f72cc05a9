"""The frontier's figure and table."""

from pathlib import Path
from typing import Any

import numpy as np

from minidpo.commands.figures import COLOURS, INK, MARKS, drawing, label_points, png_and_svg
from minidpo.commands.frontier_judge import Point, Setting

NAMES = {"dpo": "DPO", "ipo": "IPO", "simpo": "SimPO"}
TICKS = (0, 0.1, 0.5, 1, 2, 4, 6, 10, 15, 20, 30, 40)


def table(start: Point, runs: dict[Setting, list[Point]]) -> str:
    """The last point of each run: the mean of what its answers earn, and what they cost."""
    lines = [f"{'loss':<7} {'beta':>5} {'gamma':>6} {'true reward, nats':>19} {'KL, nats':>15} {'words':>6}"]
    rows = [("SFT", "", "", start)]
    for setting, points in runs.items():
        gamma = "" if setting.gamma is None else f"{setting.gamma:g}"
        rows.append((NAMES[setting.loss], f"{setting.beta:g}", gamma, points[-1]))
    for name, beta, gamma, p in rows:
        reward, kl = f"{p.reward:.2f} +- {p.reward_error:.2f}", f"{p.kl:.2f} +- {p.kl_error:.2f}"
        lines.append(f"{name:<7} {beta:>5} {gamma:>6} {reward:>19} {kl:>15} {p.length:>6.1f}")
    lines.append("+-: one standard error over prompts. KL: of the next token, summed along sampled answers.")
    return "\n".join(lines)


def draw(
    start: Point, best: dict[str, list[float]], runs: dict[Setting, list[Point]], name: Path
) -> list[Path]:
    """Reward against KL on a square-root axis, which gives both the near and the far their room.

    A thin line is one run from the reference on; its small marks are the evaluations on the way, the large one, with
    standard errors and the setting, is the end.
    """
    files = png_and_svg(name)
    losses = list(dict.fromkeys(setting.loss for setting in runs))
    labels: list[tuple[float, float, str, str]] = []
    with drawing(files, 7.2, 4.8) as figure:
        axes = figure.subplots()
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.plot(best["kl"], best["reward"], "--", color=INK, label="most that a policy can earn, estimated")
        for setting, points in runs.items():
            which = losses.index(setting.loss)
            colour, mark = COLOURS[which], MARKS[which]
            kls, rewards = [p.kl for p in points], [p.reward for p in points]
            axes.plot([start.kl, *kls], [start.reward, *rewards], color=colour, lw=0.8, alpha=0.5)
            axes.plot(kls[:-1], rewards[:-1], mark, color=colour, markersize=3.5, alpha=0.8)
            end = points[-1]
            look: dict[str, Any] = {
                "fmt": mark,
                "markersize": 8,
                "markeredgecolor": "white",
                "elinewidth": 1,
                "zorder": 3,
            }
            if setting == next(s for s in runs if s.loss == setting.loss):  # one entry of the legend a loss
                numbers = "beta" if setting.gamma is None else "beta, gamma"
                look["label"] = f"{NAMES[setting.loss]} ({numbers})"
            axes.errorbar(end.kl, end.reward, end.reward_error, end.kl_error, color=colour, **look)
            text = f"{setting.beta:g}" + ("" if setting.gamma is None else f", {setting.gamma:g}")
            labels.append((end.kl, end.reward, text, colour))
        star: dict[str, Any] = {
            "marker": "*",
            "markersize": 11,
            "color": INK,
            "ls": "",
            "zorder": 4,
            "clip_on": False,
        }
        axes.plot(start.kl, start.reward, label="SFT, the reference", **star)
        farthest = max(p.kl for points in runs.values() for p in points)
        axes.set_xticks([tick for tick in TICKS if tick <= 1.1 * farthest])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(left=0)
        axes.set_xlabel("KL from the reference, nats a response (square-root scale)")
        axes.set_ylabel("true reward of sampled answers, nats")
        axes.set_title("What each loss earns for how far it goes from the reference")
        axes.legend(loc="upper right")
        on_the_way = [(p.kl, p.reward) for points in runs.values() for p in points[:-1]]
        label_points(figure, axes, labels, on_the_way + list(zip(best["kl"], best["reward"], strict=True)))
    return files
