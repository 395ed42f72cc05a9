"""`python -m minidpo report`: a page that shows what runs did, in one file to open in a browser.

It tells the runs in words, draws their curves, and of each run shows held-out pairs (of a policy token by
token, of a reward model how sure it is), samples before and after training, and the settings.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidpo.config import load_either_config
from minidpo.data import PairTokens, Tokenizer, load_pairs
from minidpo.errors import UserError
from minidpo.files import require_place
from minidpo.log import COLUMNS
from minidpo.model import load_reward_model
from minidpo.model.tensors import count_parameters
from minidpo.sections import RewardConfig
from minidpo.tools.explain_text import responses_of, settings
from minidpo.tools.figures import COLOURS
from minidpo.tools.pair_numbers import explanations
from minidpo.tools.plot import Run, curves_in, panels_of, read_runs
from minidpo.tools.report_page import Line, Markup, article, chart, tag, token_pairs, write_page
from minidpo.training.advice import Advice
from minidpo.training.device import choose_device
from minidpo.training.reward_scorer import with_error
from minidpo.training.scoring import MICRO_TOKENS, all_rewards, require_finite

SAMPLES = 8  # prompts of which samples are shown
BINS, GROUPS = 20, 8  # of margins; of pairs, by probability and by length
ENDS = 2  # pairs shown of which a reward model is most wrong, and the same of those most sure


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo report", description=about)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", type=Path, help="directory of a run (run.out)")
    add("--out", metavar="FILE", default="report.html", help="the page (default: report.html)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    read = [run / name for run in options.runs for name in ("metrics.jsonl", "config.toml")]
    require_place("--out", options.out, *read)
    device, runs = choose_device(options.device), read_runs(options.runs)
    configs = [load_either_config([f"{run.path}/config.toml"]) for run in runs]
    require_place("--out", options.out, *(file for c in configs for file in c.data.train + c.data.eval))
    parts = [tag("p", *in_words(*each)) for each in zip(runs, configs, strict=True)]
    parts += curves(runs)
    for run, config in zip(runs, configs, strict=True):
        parts += [tag("h2", f"{run.name}: held-out pairs"), *held_out(run, config, device), *samples(run)]
        written = tag("pre", (run.path / "config.toml").read_text(encoding="utf-8"))
        parts.append(tag("details", tag("summary", f"All settings of {run.name}"), written))
    write_page(Path(options.out), ", ".join(run.name for run in runs), parts)


def in_words(run: Run, config: Any) -> Iterator[object]:
    """What was trained, on what, for how long, with which result, and what the advice says."""
    loss, optim, adapters = config.loss, config.optim, config.lora.rank > 0
    is_finished = (run.path / "final").is_dir()
    parameters = count_parameters(run.path / "final") if is_finished else 0
    unit = "pairs" if loss.responses == 2 else "responses"
    last = {"step": 0, "epoch": 0.0} | next((line for line in run.lines[::-1] if "epoch" in line), {})
    with_settings = settings(type(loss), vars(loss)) or "no settings"
    yield tag("b", run.name)
    yield f" started from {config.model.path} ({parameters:,} parameters{', with adapters' * adapters}). "
    yield f"Its loss is {loss.name}, {loss.equation}, with {with_settings}. "
    yield f"It made {last['step']} steps of {optim.batch_size} {unit}, {last['epoch']:.2f} epochs of "
    yield f"{', '.join(Path(file).name for file in config.data.train)}, at a rate of up to {optim.lr:g}. "
    yield "" if is_finished else "It is not finished: there is no final/. "

    advice = Advice(loss, parameters, optim.lr, adapters, (warnings := list[str]()).append)
    for line in run.lines:
        advice.on_line(line)
    if evaluations := [line for line in run.lines if "loss" not in line]:
        yield f"On held-out {unit}, step {evaluations[0]['step']} → {evaluations[-1]['step']}"
        for key, label, form in COLUMNS:
            values = (evaluations[k].get(f"eval/{key}", np.nan) for k in (0, -1))
            was, now = (f"{value:{form}}".strip() for value in values)
            yield f", {label} {was} → {now}" * (was != now)
        yield ". "
    yield " ".join(f"W{warning[1:]}." for warning in warnings) or "There is nothing to warn of."


def curves(runs: list[Run]) -> Iterator[Markup]:
    """The panels of `plot`, and above them a button per run that hides its lines."""
    yield tag("h2", "Curves")
    for number, run in enumerate(runs if len(runs) > 1 else ()):
        yield tag("button", run.name, style=f"color: {COLOURS[number]}", data_run=f"run{number}")
    charts: list[Markup] = []
    for panel in panels_of(runs):
        lines = []
        for number, key, of_held_out, points, style in curves_in(panel, runs):
            about = f"{runs[number].name}, {key} at step"
            classes = f"run{number}" + " training" * (not of_held_out) + " dashed" * (style["ls"] == "--")
            lines.append(Line(points.T, about * of_held_out, classes, style["color"]))
        charts.append(chart(panel.title, panel.good, lines, panel.level))
    yield tag("p", "Dots: held-out pairs. Faint: training. Dashed: rejected. Dotted: to compare with.")
    yield tag("div", *charts, class_="charts")


def held_out(run: Run, config: Any, device: torch.device) -> list[Markup]:
    """What the run's model says of pairs that it was not trained on, or why nothing is shown of them."""
    model, kept, rewards = run.path / "final", run.path / "tokens", isinstance(config, RewardConfig)
    try:
        tokenizer = Tokenizer.from_pretrained(model, rewards)
        with redirect_stdout(StringIO()):  # The run has told what is in its data.
            _, pairs = load_pairs(config.data, tokenizer, config.run.seed, kept if kept.is_dir() else None)
        if not len(pairs):
            raise UserError("the run holds out none (data.eval, data.eval_pairs)")
        if not rewards and config.loss.unpaired and pairs.label is None:
            pairs = pairs.unpaired()
        most = 1000 if rewards else 100
        pairs = pairs.select(np.arange(0, len(pairs), -(-len(pairs) // most)))  # evenly out of all
        about = f"Of {len(pairs)} pairs that the run does not train on. Model: {model}"
        if rewards:
            values = all_rewards(load_reward_model(model, device), pairs, MICRO_TOKENS, device, "fp32")
            require_finite(values, model)
            return [tag("p", f"{about}."), *of_reward_model(values, pairs, tokenizer)]
        models = (model, config.reference_path, device)
        z0 = [0.0, *(line["eval/z0"] for line in run.lines if "eval/z0" in line)][-1]
        explained = list(explanations(pairs, tokenizer, [config.loss], *models, z0=z0))
        return [tag("p", f"{about}; pi_ref is {config.reference_path}."), *of_policy(explained)]
    except UserError as error:
        return [tag("p", f"No pairs are shown: {error}.")]


def of_policy(explained: list[dict[str, Any]]) -> Iterator[Markup]:
    """A few pairs token by token, chosen to teach."""
    gain, preferred = [], []  # by training and by the reference, in nats and in nats per token
    for e in explained:
        names = responses_of(e)
        ratios = [e[f"{name}_logps"] - e[f"reference_{name}_logps"] for name in names]
        gain.append((ratios[0] - sum(ratios[1:])) * (-1 if e["label"] is False else 1))
        per_token = [e[f"reference_{name}_logps"] / e[f"{name}_length"] for name in names]
        preferred.append(per_token[0] - per_token[-1])
    yield from token_pairs([(why, explained[row]) for row, why in to_teach(gain, preferred).items()])


def to_teach(gain: list[float], preferred: list[float]) -> dict[int, str]:
    """Rows of pairs that teach something, and what. gain, preferred: how much chosen is ahead of rejected."""
    order = np.argsort(gain, kind="stable").tolist()
    rows = {
        order[-1]: "Largest gain: of these pairs, training improved this one most",
        order[0]: "Largest loss: training improved this pair least, or made it worse",
        order[len(order) // 2]: "Typical: half of the pairs gained less than this one, half gained more",
    }
    why = "Looks mislabelled: the reference finds rejected likelier per token, and training went that way too"
    doubtful = [row for row in order if gain[row] < 0 > preferred[row] and row not in rows]
    return rows | {row: why for row in sorted(doubtful, key=lambda row: preferred[row])[:1]}


def of_reward_model(rewards: np.ndarray, pairs: PairTokens, tokenizer: Tokenizer) -> Iterator[Markup]:
    """rewards (n, 2): how sure the model is and how often right, and of which pairs most sure, most wrong."""
    margins, longer = rewards[:, 0] - rewards[:, 1], -np.diff(pairs.scored_lengths)[:, 0]
    counts, edges = np.histogram(margins, BINS)
    bars = Line(np.stack([(edges[1:] + edges[:-1]) / 2, counts], axis=1), "pairs with a margin about")
    # sigma(|margin|) is the probability that the model gives to the response that it ranks higher.
    observed = by_groups(1 / (1 + np.exp(-np.abs(margins))), (np.sign(margins) + 1) / 2)
    calibration = [Line([(0.5, 0.5), (1, 1)], look="level"), Line(observed, "share right where predicted")]
    by_length = [Line(by_groups(longer, margins > 0), "accuracy where chosen is longer by")]
    right = f"right of 0 is right: accuracy {with_error(margins > 0, '.3f')}"
    charts = [chart("Margins, pairs", right, [bars])]
    charts += [chart("Calibration", "predicted, and share right; best if dotted", calibration)]
    charts += [chart("Accuracy by length, chosen - rejected", "flat; rising: longer wins", by_length, 0.5)]
    yield tag("div", *charts, class_="charts")

    order = np.argsort(margins, kind="stable").tolist()
    ends = [("Most wrong", row) for row in order[:ENDS]] + [("Most sure", row) for row in order[-ENDS:]]
    for title, row in ends:
        ids = pairs.pair(row)
        prompt, *said = map(tokenizer.decode, (ids.prompt, *ids.responses))
        both = zip(("chosen", "rejected"), rewards[row], said, strict=True)
        texts = {f"{name}, reward {reward:.4f}": text for name, reward, text in both}
        where = f"record {ids.index} of {pairs.files[ids.file]}"
        yield article(f"{title}: margin {margins[row]:.4f}", where, prompt, texts)


def by_groups(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Pairs in the order of x, cut into groups of equal size: the means of x and y in each."""
    groups = np.array_split(np.argsort(x, kind="stable"), min(GROUPS, len(x)))
    return [(float(x[group].mean()), float(y[group].mean())) for group in groups]


def samples(run: Run) -> Iterator[Markup]:
    """What the policy wrote at the first and at the last evaluation, prompt by prompt."""
    files = sorted((run.path / "samples").glob("step-*"), key=lambda file: (len(file.name), file.name))
    if not files:
        return
    yield tag("h2", f"{run.name}: samples before and after")
    yield tag("p", "At temperature 1; first those that training has changed most.")
    lines = (file.read_text(encoding="utf-8").splitlines() for file in (files[0], files[-1]))
    before, after = ({row["prompt"]: row for row in map(json.loads, of_file)} for of_file in lines)
    prompts = sorted(before.keys() & after.keys(), key=lambda prompt: (-after[prompt]["kl"], prompt))
    for prompt in prompts[:: -(-len(prompts) // SAMPLES) or 1]:
        responses = {}
        for file, row in ((files[0], before[prompt]), (files[-1], after[prompt])):
            reward = f", reward {row['reward']:.3f}" if "reward" in row else ""
            about = f"{file.stem}: KL {row['kl']:.2f} nats{reward}, {row['tokens']} tokens"
            responses[about + ", not ended" * (not row["ended"])] = row["response"].strip()
        yield article(f"KL {after[prompt]['kl']:.2f} nats", "after training", prompt, responses)
