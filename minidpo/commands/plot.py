"""`python -m minidpo plot`: how a run went, or how several compare, from their metrics.jsonl.

Held-out values are lines with marks, training values light lines, smoothed by a centred running mean. A panel is one
quantity; those that no run has measured are left out.
"""

from __future__ import annotations

import argparse
import math
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minidpo.commands.figures import COLOURS, INK, MARKS, drawing, png_and_svg, require_matplotlib
from minidpo.errors import UserError
from minidpo.files import require_file
from minidpo.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_WIDTH, PANEL_HEIGHT = 3.1, 2.1  # inches
CHOSEN, REJECTED, ONE = "chosen", "rejected", ""


class Panel(NamedTuple):
    title: str  # quantity and unit
    curves: tuple[
        tuple[str, str], ...
    ]  # (key in metrics.jsonl, of which ending); held out under "eval/" + key


PANELS = (
    Panel("Loss", (("loss", ONE),)),
    Panel("Preference loss, nats", (("preference_loss", ONE),)),
    Panel("LM loss, nats a token", (("lm_loss", ONE),)),
    Panel("Reward, nats", (("rewards/chosen", CHOSEN), ("rewards/rejected", REJECTED))),
    Panel("Mean reward, nats", (("mean_reward", ONE),)),
    Panel("Margin of rewards, nats", (("rewards/margins", ONE), ("margin", ONE))),
    Panel("Accuracy, share of pairs", (("rewards/accuracies", ONE), ("accuracy", ONE))),
    Panel("KL from the reference, nats", (("kl", ONE),)),
    Panel("Reward of samples, nats", (("reward", ONE),)),
    Panel("Samples that win, share", (("win_rate", ONE),)),
    Panel("Samples that ended, share", (("ended", ONE),)),
    Panel("Sampled length, tokens", (("sample_length", ONE),)),
    Panel("Response length (data), tokens", (("response_length/chosen", CHOSEN), ("response_length/rejected", REJECTED))),
    Panel("Learning rate", (("lr", ONE),)),
    Panel("Gradient norm", (("grad_norm", ONE),)),
)  # fmt: skip
LOSS_UNITS = {"ipo": "nats²", "sft": "nats a token"}  # the others' is nats


class Curve(NamedTuple):
    steps: np.ndarray
    values: np.ndarray


class Run(NamedTuple):
    name: str
    loss: str  # as [loss] name says; empty for a reward model, and where config.toml is missing
    curves: dict[str, Curve]  # by key in metrics.jsonl


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo plot", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run (run.out)")
    parser.add_argument(
        "--out",
        metavar="NAME",
        help="NAME.png and NAME.svg are written (default: RUN/curves, of several runs curves beside the first)",
    )
    options = parser.parse_args(arguments)
    require_matplotlib("plot")
    if len(options.runs) > len(COLOURS):
        raise UserError(f"{len(options.runs)} runs; at most {len(COLOURS)} can be told apart in one figure")
    first = options.runs[0]
    beside = first if len(options.runs) == 1 else first.resolve().parent
    files = png_and_svg(options.out or beside / "curves")
    plot([read_run(path, options.runs) for path in options.runs], files)
    print(f"wrote {files[0]} and {files[1]}")


def read_run(directory: Path, among: list[Path]) -> Run:
    """The curves of a run. `among`: where two directories have one name, paths tell them apart."""
    file = require_file(
        directory / "metrics.jsonl",
        "plot takes directories of runs (run.out, not the final/ in it), which train_dpo.py and train_rm.py write",
    )
    points: dict[str, list[tuple[float, float]]] = {}
    for line in read_metrics(file):
        for key, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, []).append((line["step"], value))
    if not points:
        raise UserError(f"{file}: no step in it yet; plot again when the run has logged one")
    alone = [path.resolve().name for path in among].count(directory.resolve().name) == 1
    return Run(
        directory.resolve().name if alone else str(directory),
        loss_name(directory),
        {key: Curve(*np.array(rows, dtype=float).T) for key, rows in points.items()},
    )


def loss_name(directory: Path) -> str:
    try:
        return tomllib.loads((directory / "config.toml").read_text(encoding="utf-8"))["loss"].get("name", "")
    except (OSError, ValueError, KeyError):
        return ""  # only a unit hangs on it


def plot(runs: list[Run], files: list[Path]) -> None:
    """Draw every panel that has data, once into each file."""
    panels = [panel for panel in PANELS if any(curves(run, key) for run in runs for key, _ in panel.curves)]
    columns = min(len(panels), min((3, 4), key=lambda columns: -len(panels) % columns))  # fewest empty places
    rows = math.ceil(len(panels) / columns)
    with drawing(files, columns * PANEL_WIDTH, rows * PANEL_HEIGHT + 0.4) as figure:
        grid = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            draw(axes, panel, runs)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes in grid[: len(panels)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("optimizer step", fontsize="medium")
        legend(figure, runs, panels)


def curves(run: Run, key: str) -> tuple[Curve | None, Curve | None] | None:
    """What was measured held out and in training; None where neither was."""
    both = run.curves.get(f"eval/{key}"), run.curves.get(key)
    return both if any(both) else None


def draw(axes: Axes, panel: Panel, runs: list[Run]) -> None:
    title = panel.title
    if title == "Loss":
        title += ", " + " or ".join(sorted({LOSS_UNITS.get(run.loss, "nats") for run in runs}))
    axes.set_title(title)
    for index, run in enumerate(runs):
        for key, ending in panel.curves:
            held_out, training = curves(run, key) or (None, None)
            look = looks(index if len(runs) > 1 else None, ending)
            if training:
                light: dict[str, Any] = {"alpha": 0.5, "linewidth": 1.0} if held_out else {"linewidth": 1.2}
                values = training.values if key == "lr" else smoothed(training.values)
                axes.plot(training.steps, values, color=look["color"], ls=look["ls"], **light)
            if held_out:
                if (
                    len(held_out.steps) < 3
                ):  # a line from the first to the last step would tell what nobody measured
                    look["ls"] = ""
                axes.plot(*held_out, **look, markevery=math.ceil(len(held_out.steps) / 12))
    axes.yaxis.set_major_formatter("{x:g}")  # no power of ten above the axis, where the title stands
    if title.startswith("Accuracy"):
        # At step 0 policy and reference are equal and accuracy is 0 by definition: the axis shows what is learnt.
        drawn = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.lines]
        learnt = np.concatenate([values[steps > 0] for steps, values in drawn])
        if len(learnt):
            axes.set_ylim(max(-0.02, learnt.min() - 0.05), min(1.02, learnt.max() + 0.05))


def looks(run: int | None, ending: str) -> dict[str, Any]:
    """Of one run, colours tell the endings apart; of several, the runs. Lines and marks do so too."""
    which = (ONE, CHOSEN, REJECTED).index(ending) if run is None else run
    colour = (INK, *COLOURS)[which] if run is None else COLOURS[which]
    open_marks = {"markerfacecolor": "white"} if ending == REJECTED else {}
    return {
        "color": colour,
        "marker": MARKS[which],
        "ls": "--" if ending == REJECTED else "-",
    } | open_marks


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of about an eighth of the values, as many before each one as after it: the first and last as they are."""
    half = [min(len(values) // 16, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - h : i + h + 1].mean() for i, h in enumerate(half)])


def legend(figure: Figure, runs: list[Run], panels: list[Panel]) -> None:
    """One for all panels, above them: runs, endings, and which line is which."""
    from matplotlib.lines import Line2D

    keys = [key for panel in panels for key, _ in panel.curves]
    endings = {
        ending for panel in panels for key, ending in panel.curves if any(curves(r, key) for r in runs)
    }
    names = [Line2D([], [], label=run.name, **looks(i, ONE)) for i, run in enumerate(runs)]
    entries = []
    for ending in (CHOSEN, REJECTED):
        if ending in endings:
            look = looks(None, ending) | ({"color": INK, "marker": ""} if len(runs) > 1 else {})
            entries.append(Line2D([], [], label=ending, **look))
    both = [pair for key in keys for run in runs if (pair := curves(run, key))]
    if any(held_out for held_out, _ in both):
        entries.append(Line2D([], [], label="held out", color=INK, marker=MARKS[0]))
    if any(training for _, training in both):
        entries.append(Line2D([], [], label="training, smoothed", color=INK, linewidth=1, alpha=0.5))
    a_line = math.ceil(len(names) / math.ceil(len(names) / 5))
    lines = [names[i : i + a_line] for i in range(0, len(names), a_line)] if len(runs) > 1 else []
    lines.append(entries)
    columns = max(map(len, lines))
    blank = Line2D([], [], label=" ", ls="")
    padded = [line + [blank] * (columns - len(line)) for line in lines]
    in_columns = [entry for column in zip(*padded, strict=True) for entry in column]  # as legends are filled
    title = runs[0].name if len(runs) == 1 else None
    figure.legend(handles=in_columns, loc="outside upper center", ncols=columns, title=title)
