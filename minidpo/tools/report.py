"""`python -m minidpo report`: a page that shows what runs did, in one file to open in a browser.

It tells the runs in words, draws their curves, and of each run shows held-out pairs (report_pairs.py),
samples before and after training, and the settings.
"""

import argparse
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from minidpo.config import load_either_config
from minidpo.data import read_records
from minidpo.errors import UserError
from minidpo.files import require_file, require_place
from minidpo.log import COLUMNS, print0, read_metrics
from minidpo.model.adapter_files import CONFIG
from minidpo.model.tensors import count_parameters
from minidpo.sections import DPOConfig
from minidpo.tools.explain_text import settings
from minidpo.tools.plot import Run, curves_in, curves_of, look, names_of, panels_of
from minidpo.tools.report_page import Line, Markup, chart, side_by_side, tag, text, write_page
from minidpo.tools.report_pairs import Finished, of_pairs
from minidpo.training.advice import Advice
from minidpo.training.device import choose_device

SAMPLES = 8  # prompts of which samples are shown


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo report", description=about)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run (run.out)")
    add("--out", metavar="FILE", default="report.html", help="the page (default: report.html)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    require_place("--out", options.out)
    device = choose_device(options.device)
    runs = [read_finished(*each) for each in zip(options.runs, names_of(options.runs), strict=True)]
    parts = [*(tag("p", *in_words(run)) for run in runs), *curves([run.curves for run in runs])]
    for run in runs:
        parts.append(tag("h2", f"{run.curves.name}: held-out pairs"))
        try:
            with redirect_stdout(StringIO()):  # The run has told what is in its data.
                parts += of_pairs(run, device)
        except UserError as error:
            print0(f"{run.path}: no pairs are shown: {error}")
            parts.append(tag("p", f"No pairs are shown: {error}."))
        parts += samples(run) if isinstance(run.config, DPOConfig) else []
        config = (run.path / "config.toml").read_text(encoding="utf-8")
        parts.append(tag("details", tag("summary", f"All settings of {run.curves.name}"), tag("pre", config)))
    write_page(Path(options.out), ", ".join(run.curves.name for run in runs), parts)


def read_finished(path: Path, name: str) -> Finished:
    hint = "report takes directories of runs: run.out of train_dpo.py or train_rm.py, not the final/ in it"
    lines = read_metrics(require_file(path / "metrics.jsonl", hint))
    lines = [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in lines]
    config = load_either_config([str(path / "config.toml")])
    model = adapter = next(iter([*path.glob("final"), *by_step(path / "checkpoints")[::-1]]), None)
    if adapter and (adapter / CONFIG).is_file():
        model = Path(config.model.path)  # Such a checkpoint is of adapters alone; final/ is merged.
    else:
        adapter = None
    return Finished(path, config, lines, Run(name, config.loss.unit, curves_of(lines)), model, adapter)


def by_step(directory: Path) -> list[Path]:
    """What is named step-N, by N."""
    return sorted(directory.glob("step-*"), key=lambda path: (len(path.name), path.name))


def in_words(run: Finished) -> Iterator[object]:
    """What was trained, on what, for how long, with which result, and what the advice says."""
    optim, loss, adapters = run.config.optim, run.config.loss, run.config.lora.rank > 0
    parameters = count_parameters(run.model) if run.model else 0
    yield tag("b", run.curves.name)
    yield f" started from {run.config.model.path} ({parameters:,} parameters{', with adapters' * adapters}). "
    with_settings = settings(type(loss), vars(loss)) or "no settings"
    yield f"Its loss is {loss.name}, {loss.equation}, with {with_settings}. "

    unit = "pairs" if loss.responses == 2 else "responses"
    steps, epochs = run.curves.curves["epoch"][:, -1] if "epoch" in run.curves.curves else (0, 0)
    yield f"It made {steps:g} steps of {optim.batch_size} {unit}, {epochs:.2f} epochs of "
    yield f"{', '.join(Path(file).name for file in run.config.data.train)}, at a rate of up to {optim.lr:g}. "
    if not (run.path / "final").is_dir():
        yield "It is not finished: there is no final/. "

    advice = Advice(loss, parameters, optim.lr, adapters, (warnings := list[str]()).append)
    held_out = []
    for line in run.lines:
        if "loss" in line:
            advice.on_step(line)
        else:
            held_out.append({key.removeprefix("eval/"): value for key, value in line.items()})
            advice.on_evaluation(held_out[-1])
    if held_out:
        first, last = held_out[0], held_out[-1]
        yield f"On held-out {unit}, step {first['step']} → {last['step']}"
        for key, label, form in COLUMNS:
            was, now = (f"{line.get(key, 0.0):{form}}".strip() for line in (first, last))
            yield f", {label} {was} → {now}" * (was != now)
        yield ". "
    yield " ".join(f"W{warning[1:]}." for warning in warnings) or "There is nothing to warn of."


def curves(runs: list[Run]) -> Iterator[Markup]:
    """The panels of `plot`, and above them a button per run that hides its lines."""
    yield tag("h2", "Curves")
    several = len(runs) > 1
    for number, run in enumerate(runs if several else ()):
        yield tag("button", run.name, style=f"color: {look('', number)['color']}", data_run=f"run{number}")
    legend = "Dots: held-out pairs. Faint: training, smoothed. Dashed: rejected. Dotted: to compare with."
    yield tag("p", legend)
    figures: list[object] = []
    for panel in panels_of(runs)[0]:
        lines = []
        for number, key, held_out, points in curves_in(panel, runs):
            style = look(key, number if several else None)
            classes = f"run{number}" + " training" * (not held_out) + " dashed" * (style["ls"] == "--")
            about = [f"{runs[number].name}, step {x:g}: {key} {y:.5g}" for x, y in points.T if held_out]
            lines.append(Line(points.T.tolist(), about, classes, style["color"]))
        figures.append(chart(panel.title, panel.good, lines, panel.level))
    yield tag("div", *figures or ["There are none: nothing that changes was logged."], class_="charts")


def samples(run: Finished) -> Iterator[Markup]:
    """What the policy wrote at the first and at the last evaluation, prompt by prompt."""
    files = by_step(run.path / "samples")
    yield tag("h2", f"{run.curves.name}: samples before and after")
    if not files:
        yield tag("p", "No samples are shown: the run wrote none (eval.samples of train_dpo.py).")
        return
    before, after = (
        {row["prompt"]: row for _, row in read_records(file) if isinstance(row, dict) and "kl" in row}
        for file in (files[0], files[-1])
    )
    prompts = sorted(before.keys() & after.keys(), key=lambda prompt: -after[prompt]["kl"])
    yield tag("p", "At temperature 1; first those that training has changed most.")
    for prompt in prompts[:: -(-len(prompts) // SAMPLES) or 1]:
        columns = []
        for file, row in ((files[0], before[prompt]), (files[-1], after[prompt])):
            reward = f", reward {row['reward']:.3f}" if "reward" in row else ""
            ended = "" if row["ended"] else ", not ended"
            about = f"{file.stem}: KL {row['kl']:.2f} nats{reward}, {row['tokens']} tokens{ended}"
            columns.append((about, text(row["response"].strip())))
        yield tag("article", side_by_side(prompt, *columns))
