"""`python -m minidpo plot`: how a run went, or how several compare, from their metrics.jsonl.

Held-out values are lines with marks; training values are light lines, where they are many smoothed by a
centred running mean. A panel is one quantity, and says what a good run shows. Quantities that no run has
measured, or that never changed, are left out. `report` draws the same.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidpo.config import loss_of_run
from minidpo.errors import UserError
from minidpo.files import require_file
from minidpo.log import read_metrics
from minidpo.tools.figures import COLOURS, MARKS, drawing, png_and_svg, require_matplotlib
from minidpo.training.advice import MOST_KL


class Panel(NamedTuple):
    title: str  # quantity and unit
    keys: tuple[str, ...]  # in metrics.jsonl; held-out values have the same keys after "eval/"
    good: str  # what a run that goes well shows
    level: float | None = None  # a value to compare with, such as chance


# Those that matter come first: of a policy the six after the losses, of a reward model the first five.
PANELS = (
    Panel("Loss", ("loss",), "falls; held out too, or it overfits"),
    Panel("Preference loss, nats", ("preference_loss",), "falls below ln 2 = 0.69", math.log(2)),
    Panel("Accuracy, share of pairs", ("rewards/accuracies", "accuracy"), "rises above 0.5", 0.5),
    Panel("Margin of rewards, nats", ("rewards/margins", "margin"), "rises, held out too", 0.0),
    Panel("Reward, nats", ("rewards/chosen", "rewards/rejected"), "apart; chosen not far below 0", 0.0),
    Panel("KL from the reference, nats", ("kl",), f"small; below {MOST_KL:g}", MOST_KL),
    Panel("Reward of samples, nats", ("reward",), "rises; if it falls while KL rises: too far"),
    Panel("Samples that win, share", ("win_rate",), "rises above 0.5", 0.5),
    Panel("Sampled length, tokens", ("sample_length",), "steady: length is not what is learnt"),
    Panel("Samples that ended, share", ("ended",), "near 1", 1.0),
    Panel("LM loss, nats per token", ("lm_loss", "sft_loss"), "does not rise"),
    Panel("Mean reward, nats", ("mean_reward",), "does not drift far from 0", 0.0),
    Panel("Gradient norm", ("grad_norm",), "steady, without peaks"),
    Panel("Learning rate", ("lr",), "as planned"),
    Panel("Response length (data), tokens", ("response_length/chosen", "response_length/rejected"), "alike"),
)
TRAINING: dict[str, Any] = {"linewidth": 1, "alpha": 0.5}
FEW, MANY = 2, 16  # values in training: up to FEW are marked one by one, from MANY on they are smoothed
LARGEST = 1e100  # No axis can be drawn for more.


class Run(NamedTuple):
    """A run, as far as it got."""

    path: Path
    name: str
    unit: str  # of the loss
    lines: list[dict[str, float]]  # of metrics.jsonl
    curves: dict[str, np.ndarray]  # by key in metrics.jsonl: (2, n), steps and values


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo plot", description=about)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run (run.out)")
    beside = "RUN/curves, or for several runs curves beside the first"
    about = f"NAME.png and NAME.svg are written (default: {beside})"
    parser.add_argument("--out", metavar="NAME", help=about)
    options = parser.parse_args(arguments)
    require_matplotlib("plot")
    runs, first = read_runs(options.runs), options.runs[0].resolve()
    files = png_and_svg(options.out or (first if len(runs) == 1 else first.parent) / "curves")
    if not (shown := panels_of(runs)):
        where = " and ".join(str(run.path / "metrics.jsonl") for run in runs)
        raise UserError(
            f"{where}: nothing that plot draws, such as a loss, has changed in it; give other runs"
        )
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    with drawing(files, 3.4 * columns, 2.2 * rows + 0.6) as figure:
        draw(figure, runs, shown, rows, columns)
    print(f"wrote {files[0]} and {files[1]}")


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs, named as their directories, or by their paths where names are equal.

    Raises UserError for what is no run, and for more runs than there are colours.
    """
    if len(paths) > len(COLOURS):
        raise UserError(f"{len(paths)} runs; at most {len(COLOURS)} can be told apart")
    names = [path.resolve().name for path in paths]
    names = names if len(set(names)) == len(names) else list(map(str, paths))
    hint = "give directories of runs: run.out of train_dpo.py or train_rm.py, not the final/ or a file in it"
    runs = []
    for path, name in zip(paths, names, strict=True):
        read = read_metrics(file := require_file(path / "metrics.jsonl", hint))
        lines = [{key: v for key, v in line.items() if isinstance(v, float | int)} for line in read]
        curves, loss = curves_of(lines), loss_of_run(path / "final")
        if not curves:
            raise UserError(f"{file}: no step in it yet; come again when the run has logged one")
        runs.append(Run(path, name, loss.unit if loss else "nats", lines, curves))
    return runs


def curves_of(lines: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """Each key of a metrics.jsonl -> (2, n): the steps at which it is a finite number, and its values."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if abs(value) < LARGEST:  # false for NaN too
                points.setdefault(key, []).append((line["step"], value))
    return {key: np.array(p, float).T for key, p in points.items()}


def panels_of(runs: list[Run]) -> list[Panel]:
    """The panels to draw, their titles complete: those of quantities that changed, or were measured once."""
    shown, units = [], " or ".join(sorted({run.unit for run in runs}))
    for panel in PANELS:
        keys = [prefix + key for key in panel.keys for prefix in ("", "eval/")]
        values = [run.curves[key][1] for run in runs for key in keys if key in run.curves]
        if any(np.ptp(of_key) for of_key in values) or max(map(len, values), default=0) == 1:
            shown.append(panel._replace(title=f"Loss, {units}") if panel.title == "Loss" else panel)
    return shown


def curves_in(panel: Panel, runs: list[Run]) -> Iterator[tuple[int, str, bool, np.ndarray, dict[str, Any]]]:
    """Number of the run, key, whether measured on held-out pairs, (2, n): steps and values, those of training
    smoothed, and the look.

    Colour and mark tell runs apart, or chosen from rejected if there is one run; rejected is dashed.
    """
    for number, run in enumerate(runs):
        for key in panel.keys:
            rejected = key.endswith("rejected")
            index = number if len(runs) > 1 else int(rejected)
            look = {"color": COLOURS[index], "marker": MARKS[index], "ls": "--" if rejected else "-"}
            look |= {"markerfacecolor": "white"} if rejected else {}
            if (training := run.curves.get(key)) is not None:
                yield number, key, False, np.stack([training[0], smoothed(training[1])]), look
            if (held_out := run.curves.get(f"eval/{key}")) is not None:
                yield number, key, True, held_out, look


def draw(figure: Any, runs: list[Run], shown: list[Panel], rows: int, columns: int) -> None:
    """All panels, and one legend above them: the runs, and chosen and rejected if there is one run."""
    named: dict[str, Any] = {}
    for place, panel in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.set_title(panel.title, pad=16)
        about: dict[str, Any] = {"fontsize": "small", "color": "#666666"}
        axes.annotate(panel.good, (0, 1), (0, 4), "axes fraction", "offset points", **about)
        # Without a format, a power of ten would stand where the title is.
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", integer=True)
        for number, key, held_out, points, style in curves_in(panel, runs):
            if held_out:
                (line,) = axes.plot(*points, **style, markevery=math.ceil(points.shape[1] / 12))
            else:
                few = {"marker": "None" if points.shape[1] > FEW else "."}
                (line,) = axes.plot(*points, **style | TRAINING | few)
            part = key.rpartition("/")[2]
            name = part if len(runs) == 1 and part in ("chosen", "rejected") else runs[number].name
            if held_out or name not in named:
                named[name] = line
        low, high = axes.get_ylim()
        if panel.level is not None and low <= panel.level <= high:  # Further off it would flatten the curves.
            axes.axhline(panel.level, color="#999999", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=min(5, len(named)))
    figure.supxlabel("optimizer step; marks: held out, light: training, dashed: rejected", fontsize="small")


def smoothed(values: np.ndarray) -> np.ndarray:
    """A running mean over about an eighth of the values, centred: the first and the last stay as they are."""
    half = [min(len(values) // MANY, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - h : i + h + 1].mean() for i, h in enumerate(half)])
