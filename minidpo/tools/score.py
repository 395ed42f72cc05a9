"""`python -m minidpo score`: what a model thinks of every pair of a preference file, one JSON line per pair.

Nothing is truncated: a pair that does not fit max_length is left out and counted, so every number is of a
whole text. Printed is what the set shows: accuracy, mean margin, two baselines, calibration.

margin         that of the rewards of the run's loss (rewards/margins of its log); DPO's for other models
accuracy       share of pairs whose margin is > 0: strict, as in training, so a model that cannot tell has 0
a ± b          a mean and its standard error sqrt(variance / n), with the variance's n - 1
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidpo.config import config_of_run, date_of_model, loss_of_run
from minidpo.data import (
    ChatTemplate,
    DataReport,
    PairTokens,
    Tokenizer,
    read_preferences,
    require_fit,
    require_messages,
    stop_if_glued,
    tokenize_pairs,
)
from minidpo.data.records import BadRecord, read_records
from minidpo.data.report import PARTS
from minidpo.errors import UserError
from minidpo.files import require_place, write_json_lines
from minidpo.log import print0
from minidpo.losses import DPO, PairLogps, PreferenceLoss
from minidpo.model import RewardModel, Transformer, load_model, load_reward_model
from minidpo.model.adapter_files import HELP, with_tokenizer
from minidpo.sections import TEMPLATES, DataSection
from minidpo.settings import keys_of
from minidpo.tools.explain_text import settings
from minidpo.tools.reading import add_reading_options, reading_section
from minidpo.tools.score_summary import summary
from minidpo.training.device import choose_device
from minidpo.training.reference import require_reference
from minidpo.training.reward_scorer import compare_template, with_error
from minidpo.training.scoring import MICRO_TOKENS, all_logps, all_rewards, require_finite

MOST_GROUPS = 50
WITHOUT = "(none)"


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    loss, origin = _loss(options)
    device = choose_device(options.device, dtype=options.dtype)
    directory, data = Path(options.reward_model or options.model), Path(options.data)
    load = load_reward_model if options.reward_model else load_model
    model = load(directory, device=device, adapter=options.adapter)
    limit = model.config.max_length if options.max_length is None else options.max_length
    if limit < 2:
        raise UserError(f"--max-length {limit}; it must be at least 2")
    files = with_tokenizer(directory, options.adapter)
    tokenizer = Tokenizer.from_pretrained(files, rewards=bool(options.reward_model))
    require_fit("model", model.config, tokenizer, limit)
    if options.reference:
        require_reference(Path(options.reference), tokenizer, limit)
    trained = Path(options.adapter or directory)
    template = tokenizer.chat_template(options.template, date_of_model(trained))
    pairs = _read_whole(data, tokenizer, limit, template, reading_section(options, trained))
    require_messages("--template", template, pairs, tokenizer)
    if options.reward_model and pairs.on_messages:
        compare_template(directory, tokenizer, template)
    if pairs.responses == 1 and (options.by or options.beta is not None):
        raise UserError(f"--by and --beta are for pairs, and the records of {data} have one response each")
    groups = groups_of(data, options.by, pairs.index) if options.by else None

    def logps(of: Transformer, read_from: Path, name: str = "") -> dict[str, np.ndarray]:
        values = all_logps(of, pairs, options.micro_tokens, device, options.dtype, f"{name}log-probs")
        require_finite(values, read_from)
        return {f"{name}{part}_logps": of_part for part, of_part in zip(parts, values.T, strict=True)}

    columns: dict[str, np.ndarray] = {"index": pairs.index}
    parts, lengths = PARTS[1 : 1 + pairs.responses], pairs.scored_lengths
    if isinstance(model, RewardModel):
        rewards = all_rewards(model, pairs, options.micro_tokens, device, options.dtype, "rewards")
        require_finite(rewards, directory)
        columns |= {f"{part}_reward": of_part for part, of_part in zip(parts, rewards.T, strict=True)}
    else:
        columns |= logps(model, directory)
        columns |= {f"{part}_length": of_part for part, of_part in zip(parts, lengths.T, strict=True)}
        if options.reference:
            reference = Path(options.reference)
            columns |= logps(load_model(reference, device=device), reference, "reference_")

    of_pairs = zip(*(column.tolist() for column in columns.values()), strict=True)
    write_json_lines(Path(options.out), (dict(zip(columns, values, strict=True)) for values in of_pairs))
    if pairs.responses == 2:
        margins, meaning, are_logits = _margins(loss, origin, columns)
        for line in summary(margins, meaning, lengths, groups, are_logits):
            print0(line)
    elif "chosen_reward" in columns:
        print0(f"mean reward {with_error(columns['chosen_reward'], '.4f')}")
    else:
        per_token = columns["chosen_logps"] / columns["chosen_length"]
        print0(f"mean log-prob of a token, per response {with_error(per_token, '.4f')} nats")
    print0(f"{len(pairs)} pairs, one per line, written to {options.out}")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minidpo score", description=__doc__)
    which, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    which.add_argument("--model", metavar="DIR", help="a language model: log-probs of both responses")
    which.add_argument("--reward-model", metavar="DIR", help="a reward model: rewards of both responses")
    add("--adapter", metavar="DIR", help=HELP)
    add("--reference", metavar="DIR", help="with --model: this model's log-probs too")
    add("--data", metavar="FILE", required=True, help="preference file")
    add("--out", metavar="FILE", required=True, help="for the scores, one JSON line per pair")
    add("--by", metavar="FIELD", help="accuracy also for each value of this field of the records")
    add("--beta", type=float, help=f"of the rewards in the summary (default: the run's, else {DPO().beta})")
    add("--max-length", type=int, help="longest prompt + response scored (default: the model's)")
    add("--template", default="model", choices=TEMPLATES, help="how messages become text")
    add_reading_options(add)
    add("--micro-tokens", type=int, default=MICRO_TOKENS, help="tokens of one forward pass")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args(arguments)
    for option in ("reference", "beta"):
        if getattr(options, option) is not None and options.reward_model:
            raise UserError(f"--{option} goes with --model; a reward model needs none")
    require_place("--out", options.out)
    return options


def _loss(options: argparse.Namespace) -> tuple[PreferenceLoss, str]:
    """The loss whose rewards make the margins, and where its settings are from: the run that made --model,
    if its loss compares two responses; else DPO's defaults. --beta takes the place of its beta."""
    trained = Path(options.adapter or options.model) if options.model else None
    loss: Any = loss_of_run(trained) if trained else None
    origin = f"as {config_of_run(trained)} says" if trained and loss else "the defaults"
    if not loss or loss.responses < 2:
        loss, origin = DPO(), "the defaults"
    if options.beta is None:
        return loss, origin
    if "beta" not in keys_of(loss):
        raise UserError(f"--beta {options.beta}: the loss of the run, {loss.name}, has no beta")
    if loss.needs_reference and not options.reference:
        raise UserError("--beta goes with --reference: without one there is no log-ratio to scale")
    try:
        return replace(loss, beta=options.beta), f"{origin}, but for --beta"
    except ValueError as error:
        raise UserError(f"--beta {options.beta}; {str(error).rpartition('; ')[2]}") from None


def _margins(
    loss: PreferenceLoss, origin: str, columns: dict[str, np.ndarray]
) -> tuple[np.ndarray, str, bool]:
    """The margins (pairs,), in words what they are, and whether sigma(margin) is a probability."""
    if "chosen_reward" in columns:
        margins = columns["chosen_reward"] - columns["rejected_reward"]
        return margins, "reward of chosen - reward of rejected", True
    names = [f"{prefix}{name}_logps" for prefix in ("", "reference_") for name in ("chosen", "rejected")]
    names += ["chosen_length", "rejected_length"]
    logps = PairLogps(*(torch.from_numpy(columns[name]) if name in columns else None for name in names))
    if loss.needs_reference and logps.ref_chosen is None:
        only = "log pi(chosen) - log pi(rejected), nats; without --reference no reward and no calibration"
        return columns["chosen_logps"] - columns["rejected_logps"], only, False
    chosen, rejected = loss.rewards(logps)
    of_loss = f"{loss.name}, {settings(type(loss), vars(loss))} ({origin})"
    meaning = f"reward of chosen - reward of rejected under {of_loss}"
    if not loss.needs_reference:
        meaning += "; it has no reference"
    if not loss.margin_is_logit:
        meaning += "; no calibration: sigmoid(margin) is no probability there"
    return (chosen - rejected).numpy(), meaning, loss.margin_is_logit


def _read_whole(
    path: Path, tokenizer: Tokenizer, max_length: int, template: ChatTemplate, data: DataSection
) -> PairTokens:
    report = DataReport()
    texts = read_preferences(path, report, drop_identical=False, template=template, data=data)
    texts = stop_if_glued(texts, path, tokenizer, template, data.text)
    whole = tokenize_pairs(texts, tokenizer, max_length, report=report, truncate=False, drop_identical=False)
    pairs = PairTokens.from_pairs(whole)
    for line in report.lines():
        print0(line)
    return pairs


def groups_of(path: Path, field: str, index: np.ndarray) -> np.ndarray:
    """What the records at `index` (their places in the file, rising) hold under `field`, as text: (pairs,).

    Raises UserError where none of them has the field, or where its values are too many for groups.
    """
    scored, values = set(index.tolist()), []
    for place, (_, record) in enumerate(read_records(path)):
        if place in scored and not isinstance(record, BadRecord):
            value = record.get(field, WITHOUT)
            values.append(value if isinstance(value, str) else json.dumps(value))
    different = set(values)
    if different == {WITHOUT}:
        raise UserError(f"--by {field}: no scored record of {path} has such a field")
    if len(different) > MOST_GROUPS:
        raise UserError(
            f"--by {field}: {len(different)} different values; a field with at most {MOST_GROUPS} is needed"
        )
    return np.array(values)
