"""`python -m minidpo report`: a page that shows what runs did, in one file to open in a browser.

It tells the runs in words, draws their curves, and of each run shows held-out pairs (report_pairs.py),
samples before and after training, and the settings.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from minidpo.config import load_either_config
from minidpo.data import read_records
from minidpo.errors import UserError
from minidpo.files import require_file, require_place
from minidpo.log import COLUMNS, print0, read_metrics
from minidpo.model.tensors import tensor_files
from minidpo.sections import DPOConfig
from minidpo.tools.explain_text import settings
from minidpo.tools.figures import COLOURS
from minidpo.tools.plot import FIRST, Run, curves_of, names_of, panels_of, smoothed
from minidpo.tools.report_charts import Marks, chart
from minidpo.tools.report_page import MOST_TOKENS, Markup, article, first_line, tag, text, write_page
from minidpo.tools.report_pairs import Finished, parts_of_pairs
from minidpo.training.advice import Advice
from minidpo.training.device import choose_device

SAMPLES, FURTHEST = 6, 2  # shown of a run: the first ones, and those with the largest KL


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo report", description=about)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run (run.out)")
    add("--out", metavar="FILE", default="report.html", help="the page (default: report.html)")
    add("--pairs", type=int, default=200, help="how many held-out pairs are computed (default: 200)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    require_place("--out", options.out)
    if len(options.runs) > len(COLOURS):
        raise UserError(f"{len(options.runs)} runs; at most {len(COLOURS)} can be told apart on one page")
    if options.pairs < 1:
        raise UserError(f"--pairs {options.pairs}; it must be at least 1")
    device, tokens = choose_device(options.device), MOST_TOKENS // len(options.runs)
    runs = [read_finished(*each) for each in zip(options.runs, names_of(options.runs), strict=True)]
    parts = [*(tag("p", *in_words(run)) for run in runs), *curves([run.curves for run in runs])]
    for run in runs:
        parts += [tag("h2", run.curves.name)] if len(runs) > 1 else []
        try:
            parts += parts_of_pairs(run, options.pairs, device, tokens)
        except UserError as error:
            print0(f"{run.path}: no pairs are shown: {error}")
            parts.append(tag("p", f"No pairs are shown: {error}.", class_="note"))
        parts += samples(run)
        config = (run.path / "config.toml").read_text(encoding="utf-8")
        parts.append(tag("details", tag("summary", "All settings"), tag("pre", config)))
    write_page(Path(options.out), ", ".join(run.curves.name for run in runs), parts)


def read_finished(path: Path, name: str) -> Finished:
    hint = "report takes directories of runs: run.out of train_dpo.py or train_rm.py, not the final/ in it"
    lines = read_metrics(require_file(path / "metrics.jsonl", hint))
    lines = [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in lines]
    # Whether tensorboard is installed here does not matter to the page.
    config = load_either_config([str(path / "config.toml"), "--run.tensorboard=false"])
    models = [*_by_step((path / "checkpoints").glob("step-*")), path / "final"]
    models = [model for model in models if (model / "config.json").is_file()]
    curves = Run(name, config.loss.unit, curves_of(lines))
    return Finished(path, config, lines, curves, models[-1] if models else None)


def in_words(run: Finished) -> Iterator[object]:
    """What was trained, on what, for how long, with which result, and what the advice says."""
    model, optim, loss = run.config.model.path, run.config.optim, run.config.loss
    tensors = tensor_files(run.model) if run.model else {}
    shapes = (safe_open(file, "pt").get_slice(name).get_shape() for name, file in tensors.items())
    parameters = sum(map(math.prod, shapes))
    size = f", {parameters:,} parameters" if parameters else ""
    equation = f"{loss.equation} with {settings(type(loss), vars(loss)) or 'no settings'}"
    yield tag("b", run.curves.name)
    yield f" started from {model}{size}. Loss: {loss.name}, {equation}. {first_line(type(loss))} "

    files = ", ".join(Path(file).name for file in run.config.data.train)
    if "epoch" in run.curves.curves:
        step, epochs = run.curves.curves["epoch"][:, -1].tolist()
        pairs = round(step * optim.batch_size / epochs)
        yield f"It made {step:g} steps of {optim.batch_size} pairs, {epochs:.2f} epochs of about {pairs:,} pairs"
        yield f" of {files}, at a learning rate of up to {optim.lr:g}. "
    else:
        yield f"It is to be trained on {files}, and has logged no step. "
    if not run.model or run.model.name != "final":
        yield "It is not finished: there is no final/. "

    advice = Advice(loss, parameters, optim.lr, run.config.lora.rank > 0, (warnings := list[str]()).append)
    evaluations = []
    for line in run.lines:
        if held_out := {k.removeprefix("eval/"): v for k, v in line.items() if k.startswith("eval/")}:
            advice.on_evaluation(held_out)
            evaluations.append(held_out | {"step": line["step"]})
        elif "loss" in line:
            advice.on_step(line)
    if evaluations:
        first, end = evaluations[0], evaluations[-1]
        yield f"On held-out pairs, from step {first['step']} to step {end['step']}: "
        yield ", ".join(_changes(first, end)) + ". "
    yield (
        " ".join(f"{warning[0].upper()}{warning[1:]}." for warning in warnings)
        or "There is nothing to warn of."
    )


def _changes(first: dict[str, float], end: dict[str, float]) -> Iterator[str]:
    for name, label, form in COLUMNS:
        if name in first and name in end and label not in ("chosen", "rejected"):
            was, now = (f"{values[name]:{form}}".strip() for values in (first, end))
            if was != now:
                yield f"{label} {was} → {now}"


def curves(runs: list[Run]) -> Iterator[Markup]:
    """The panels of `plot`: those that matter first, the others below."""
    shown, constant = panels_of(runs)
    figures = []
    for panel in shown:
        marks = []
        for number, run in enumerate(runs):
            for key in panel.keys:
                rejected = key.endswith("rejected")
                colour = number if len(runs) > 1 else int(rejected)
                look = f"c{colour} run{number}" + " dashed" * rejected
                if (training := run.curves.get(key)) is not None:
                    points = list(zip(training[0].tolist(), smoothed(training[1]).tolist(), strict=True))
                    marks.append(Marks("line", points, f"{look} training"))
                if (held_out := run.curves.get(f"eval/{key}")) is not None:
                    points = list(zip(*held_out.tolist(), strict=True))
                    about = [f"{run.name}, step {step:g}: {key} {value:.5g}" for step, value in points]
                    marks += [Marks("line", points, look), Marks("dots", points, look, about)]
        figures.append(chart(panel.title, panel.good, marks, panel.level))
    yield tag("h2", "Curves")
    names = [tag("button", run.name, class_=f"c{n}", data_run=f"run{n}") for n, run in enumerate(runs)]
    said = "Dots: held-out pairs. Faint: training, smoothed. Dashed: rejected. Dotted: to compare with."
    if not figures:
        said = "There are none: nothing that changes was logged."
    yield tag("p", *(names if len(runs) > 1 else ()), said, class_="legend")
    yield tag("div", *figures[:FIRST], class_="charts")
    if figures[FIRST:]:
        yield tag("details", tag("summary", "More"), tag("div", *figures[FIRST:], class_="charts"))
    if constant:
        yield tag("p", f"Never changed: {'; '.join(constant)}.", class_="note")


def samples(run: Finished) -> Iterator[Markup]:
    """What the policy wrote at the first and at the last evaluation, prompt by prompt."""
    files = _by_step((run.path / "samples").glob("step-*.jsonl"))
    if not files:
        if isinstance(run.config, DPOConfig):
            yield tag("p", "No samples are shown: the run wrote none (eval.samples).", class_="note")
        return
    before, after = (_rows(file) for file in (files[0], files[-1]))
    prompts = [prompt for prompt in after if prompt in before]
    furthest = sorted(prompts, key=lambda prompt: -_kl(after[prompt]))[:FURTHEST]
    yield tag("h3", "Samples before and after")
    said = f"At temperature 1, for the first {SAMPLES} prompts and the {FURTHEST} with the largest KL."
    yield tag("p", said, class_="note")
    for prompt in dict.fromkeys(prompts[:SAMPLES] + furthest):
        sides = ((files[0].stem, before[prompt]), (files[-1].stem, after[prompt]))
        yield article("", prompt, *((step, text(str(row["response"])), _about(row)) for step, row in sides))


def _rows(file: Path) -> dict[str, dict[str, Any]]:
    rows = (record for _, record in read_records(file) if isinstance(record, dict))
    needed = {"prompt", "response", "log_ratio", "tokens", "ended"}
    return {str(row["prompt"]): row for row in rows if needed <= row.keys()}


def _kl(row: dict[str, Any]) -> float:
    return row.get("kl", row["log_ratio"])  # Runs of older versions have the other estimate alone.


def _about(row: dict[str, Any]) -> str:
    reward = f", reward {row['reward']:.3f}" if "reward" in row else ""
    return f"KL {_kl(row):.2f} nats{reward}, {row['tokens']} tokens" + ("" if row["ended"] else ", not ended")


def _by_step(paths: Iterator[Path]) -> list[Path]:
    """Those named step-N, by N."""
    numbers = {path: path.name.partition(".")[0][5:] for path in paths}
    return sorted((path for path, n in numbers.items() if n.isdecimal()), key=lambda path: int(numbers[path]))
