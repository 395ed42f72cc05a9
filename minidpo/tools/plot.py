"""`python -m minidpo plot`: how a run went, or how several compare, from their metrics.jsonl.

Held-out values are lines with marks; training values are light lines, where they are many smoothed by a
centred running mean. A panel is one quantity; those that no run has measured are left out.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minidpo.config import loss_of_run
from minidpo.errors import UserError
from minidpo.files import require_file
from minidpo.log import read_metrics
from minidpo.tools.figures import COLOURS, INK, MARKS, drawing, png_and_svg, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Quantity and unit -> keys in metrics.jsonl. Held-out values have the same keys after "eval/".
PANELS = {
    "Loss": ("loss",),
    "Preference loss, nats": ("preference_loss",),
    "LM loss, nats per token": ("lm_loss",),
    "Reward, nats": ("rewards/chosen", "rewards/rejected"),
    "Mean reward, nats": ("mean_reward",),
    "Margin of rewards, nats": ("rewards/margins", "margin"),
    "Accuracy, share of pairs": ("rewards/accuracies", "accuracy"),
    "KL from the reference, nats": ("kl",),
    "Reward of samples, nats": ("reward",),
    "Samples that win, share": ("win_rate",),
    "Samples that ended, share": ("ended",),
    "Sampled length, tokens": ("sample_length",),
    "Response length (data), tokens": ("response_length/chosen", "response_length/rejected"),
    "Learning rate": ("lr",),
    "Gradient norm": ("grad_norm",),
}
TRAINING: dict[str, Any] = {"linewidth": 1, "alpha": 0.5}
FEW, MANY = 2, 16  # values of a curve: up to FEW are marked one by one, from MANY on they are smoothed
LARGEST = 1e100  # No axis can be drawn for more.


class Run(NamedTuple):
    name: str
    unit: str  # of the loss
    curves: dict[str, np.ndarray]  # by key in metrics.jsonl: (2, n), steps and values


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo plot", description=about)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run (run.out)")
    beside = "RUN/curves, or for several runs curves beside the first"
    parser.add_argument(
        "--out", metavar="NAME", help=f"NAME.png and NAME.svg are written (default: {beside})"
    )
    options = parser.parse_args(arguments)
    require_matplotlib("plot")
    if len(options.runs) > len(COLOURS):
        raise UserError(f"{len(options.runs)} runs; at most {len(COLOURS)} can be told apart in one figure")
    names = [path.resolve().name for path in options.runs]
    if len(set(names)) < len(names):
        names = list(map(str, options.runs))
    runs = [read_run(path, name) for path, name in zip(options.runs, names, strict=True)]
    first = options.runs[0].resolve()
    files = png_and_svg(options.out or (first if len(runs) == 1 else first.parent) / "curves")
    measured = {key.removeprefix("eval/") for run in runs for key in run.curves}
    shown = [title for title, keys in PANELS.items() if measured & set(keys)]
    if not shown:
        where = " and ".join(str(path / "metrics.jsonl") for path in options.runs)
        raise UserError(f"{where}: nothing that plot draws, such as a loss, is in it; give the file of a run")
    columns = min(4, len(shown))
    rows = math.ceil(len(shown) / columns)
    with drawing(files, 3.1 * columns, 2.1 * rows + 0.4) as figure:
        draw(figure, runs, shown, rows, columns)
    print(f"wrote {files[0]} and {files[1]}")


def read_run(directory: Path, name: str) -> Run:
    hint = "plot takes directories of runs: run.out of train_dpo.py or train_rm.py, not the final/ in it"
    file = require_file(directory / "metrics.jsonl", hint)
    points: dict[str, list[tuple[float, float]]] = {}
    for line in read_metrics(file):
        for key, value in line.items():
            if isinstance(value, int | float) and abs(value) < LARGEST:  # false for NaN too
                points.setdefault(key, []).append((line["step"], value))
    if not points:
        raise UserError(f"{file}: no step in it yet; plot again when the run has logged one")
    loss = loss_of_run(directory / "final")
    return Run(name, loss.unit if loss else "nats", {key: np.array(p, float).T for key, p in points.items()})


def draw(figure: Figure, runs: list[Run], shown: list[str], rows: int, columns: int) -> None:
    """All panels, one legend above them, one label of the steps below."""
    units = " or ".join(sorted({run.unit for run in runs}))
    for place, title in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, place, title=f"Loss, {units}" if title == "Loss" else title)
        # Without a format, a power of ten would stand where the title is.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", integer=True)
        for number, run in enumerate(runs):
            for key in PANELS[title]:
                draw_curves(axes, run, key, look(key, number if len(runs) > 1 else None))
    figure.supxlabel("optimizer step", fontsize="medium")
    legend(figure, runs)


def draw_curves(axes: Axes, run: Run, key: str, style: dict[str, Any]) -> None:
    """What was measured in training and on held-out pairs."""
    training, held_out = run.curves.get(key), run.curves.get(f"eval/{key}")
    if training is not None:
        steps, values = training
        mark = "None" if len(values) > FEW else "."
        look_of_it = {"color": style["color"], "ls": style["ls"], "marker": mark} | TRAINING
        axes.plot(steps, smoothed(values), **look_of_it)
    if held_out is not None:
        # A full line from the first to the last step would show what nobody measured.
        line = style if held_out.shape[1] > FEW else style | {"ls": ":"}
        axes.plot(*held_out, **line, markevery=math.ceil(held_out.shape[1] / 12))


def look(key: str, number: int | None = None) -> dict[str, Any]:
    """Colour and mark tell runs apart, or chosen from rejected if there is one run; rejected is dashed."""
    rejected = key.endswith("rejected")
    index = int(rejected) if number is None else number
    style = {"color": COLOURS[index], "marker": MARKS[index], "ls": "--" if rejected else "-"}
    return style | ({"markerfacecolor": "white"} if rejected else {})


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over about an eighth of the values, centred: the first and the last stay as they are."""
    half = [min(len(values) // MANY, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - h : i + h + 1].mean() for i, h in enumerate(half)])


def legend(figure: Figure, runs: list[Run]) -> None:
    """One for all panels: the runs, if there are several, and which line is which."""
    from matplotlib.lines import Line2D

    several = len(runs) > 1
    handles = [Line2D([], [], label=run.name, **look("", i)) for i, run in enumerate(runs) if several]
    of_every_run = {"color": INK, "marker": ""} if several else {}
    styles = {  # label -> part of the keys that are drawn so, and style
        "chosen": ("/chosen", look("chosen") | of_every_run),
        "rejected": ("/rejected", look("rejected") | of_every_run),
        "held out": ("eval/", {"color": INK, "marker": MARKS[0]}),
    }
    for label, (part, style) in styles.items():
        if any(part in key for run in runs for key in run.curves):
            handles.append(Line2D([], [], label=label, **style))
    keys = [key for keys in PANELS.values() for key in keys]  # of training values
    smooth = {run.curves[key].shape[1] >= MANY for run in runs for key in keys if key in run.curves}
    if smooth:
        how = ", smoothed" if smooth == {True} else ", partly smoothed" if True in smooth else ""
        handles.append(Line2D([], [], label=f"training{how}", color=INK, **TRAINING))
    title = None if several else runs[0].name
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), title=title)
