"""`python -m minidpo score`: what a model thinks of every pair of a preference file, one JSON line per pair.

Nothing is truncated: a pair that does not fit max_length is left out and counted, so every number is of a
whole text, even where training cut it, of which a line is printed, as of a file that was trained on. Then
follows what the set shows: accuracy, mean margin, and the accuracy of the longer response.

margin         that of the rewards of the run's loss (rewards/margins of its log); DPO's for other models
accuracy       share of pairs whose margin is > 0: strict, as in training, so a model that cannot tell has 0
a ± b          a mean and its standard error sqrt(variance / n), with the variance's n - 1
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from minidpo.config import data_of_model
from minidpo.data import (
    DataReport,
    PairTokens,
    Tokenizer,
    read_preferences,
    read_records,
    require_fit,
    require_messages,
    stop_if_glued,
    tokenize_pairs,
)
from minidpo.data.report import PARTS
from minidpo.errors import UserError
from minidpo.files import require_place, write_json_lines
from minidpo.log import aligned, print0
from minidpo.losses import DPO, PairLogps, PreferenceLoss
from minidpo.model import RewardModel, load_model, load_reward_model
from minidpo.model.adapter_files import HELP, with_tokenizer
from minidpo.sections import TEMPLATES
from minidpo.tools.explain_text import settings
from minidpo.tools.reading import (
    add_reading_options,
    chosen_loss,
    cut_in_training,
    reading_section,
    trained_on,
)
from minidpo.training.device import choose_device
from minidpo.training.reference import require_reference
from minidpo.training.reward_scorer import compare_template, with_error
from minidpo.training.scoring import MICRO_TOKENS, all_logps, all_rewards, require_finite

MOST_GROUPS = 50


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    device = choose_device(options.device, dtype=options.dtype)
    directory, is_policy = Path(options.reward_model or options.model), not options.reward_model
    given = {} if options.beta is None else {"beta": options.beta}
    trained = Path(options.adapter or directory)
    loss, file = chosen_loss(trained, lambda loss: loss.responses == 2, None, given)
    origin = (f"as {file} says" if file else "the defaults") + ", but for --beta" * bool(given)
    if given and loss.needs_reference and not options.reference:
        raise UserError("--beta goes with --reference: without one there is no log-ratio to scale")
    load = load_model if is_policy else load_reward_model
    model = load(directory, device=device, adapter=options.adapter)
    tokenizer = Tokenizer.from_pretrained(with_tokenizer(directory, options.adapter), rewards=not is_policy)
    limit = model.config.max_length if options.max_length is None else options.max_length
    require_fit("model", model.config, tokenizer, limit)
    if options.reference:
        require_reference(Path(options.reference), tokenizer, limit)
    pairs = _read_whole(options, trained, tokenizer, limit)
    groups = groups_of(Path(options.data), options.by, pairs.index) if options.by else None

    # A column per quantity, (n,), under its key in the file.
    columns: dict[str, np.ndarray] = {"index": pairs.index}
    passes = (options.micro_tokens, device, options.dtype)

    def add(key: str, values: np.ndarray, of: str | Path = "") -> None:
        require_finite(values, of)
        columns.update((key.format(part), its) for part, its in zip(PARTS[1:], values.T, strict=False))

    if isinstance(model, RewardModel):
        add("{}_reward", all_rewards(model, pairs, *passes, "rewards"), directory)
    else:
        add("{}_logps", all_logps(model, pairs, *passes, "log-probs"), directory)
        add("{}_length", pairs.scored_lengths)
        if options.reference:
            reference = load_model(options.reference, device=device)
            values = all_logps(reference, pairs, *passes, "reference log-probs")
            add("reference_{}_logps", values, options.reference)
    if options.out:
        of_pairs = zip(*(column.tolist() for column in columns.values()), strict=True)
        write_json_lines(Path(options.out), (dict(zip(columns, values, strict=True)) for values in of_pairs))

    if pairs.responses == 2:
        margins, meaning = _margins(loss, origin, columns)
        print0(f"margin: {meaning}")
        print0(summary(margins, pairs.scored_lengths, groups))
    elif "chosen_reward" in columns:
        print0(f"mean reward {with_error(columns['chosen_reward'], '.4f')}")
    else:
        per_token = columns["chosen_logps"] / columns["chosen_length"]
        print0(f"mean log-prob of a token, per response {with_error(per_token, '.4f')} nats")
    if options.out:
        print0(f"{len(pairs)} pairs, one per line, written to {options.out}")


def _options(arguments: list[str]) -> argparse.Namespace:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m minidpo score", None, __doc__, formatter_class=as_it_stands)
    which, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    which.add_argument("--model", metavar="DIR", help="a language model: log-probs of both responses")
    which.add_argument("--reward-model", metavar="DIR", help="a reward model: rewards of both responses")
    add("--adapter", metavar="DIR", help=HELP)
    add("--reference", metavar="DIR", help="with --model: this model's log-probs too")
    add("--data", metavar="FILE", required=True, help="preference file")
    add("--out", metavar="FILE", help="for the scores, one JSON line per pair")
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
    if options.out:
        require_place("--out", options.out, options.data)
    return options


def _read_whole(options: argparse.Namespace, trained: Path, tokenizer: Tokenizer, limit: int) -> PairTokens:
    """The pairs of --data that fit the limit, none of them cut."""
    file, report = Path(options.data), DataReport()
    data = reading_section(options, trained)
    template = tokenizer.chat_template(options.template, data_of_model(trained).date)
    texts = read_preferences(file, report, drop_identical=False, template=template, data=data)
    texts = stop_if_glued(texts, file, tokenizer, template, data.text)
    pairs = PairTokens.from_pairs(tokenize_pairs(texts, tokenizer, limit, report=report, whole=True))
    print0("\n".join(report.lines()))
    if warning := trained_on(trained, file):
        print0(warning)
    cut, limits = cut_in_training(trained, pairs.lengths)
    if cut:
        print0(f"{cut} pairs are scored whole, but training cuts them ({limits})")
    require_messages("--template", template, pairs, tokenizer)
    if options.reward_model and pairs.on_messages:
        compare_template(Path(options.reward_model), tokenizer, template)
    if pairs.responses == 1 and (options.by or options.beta is not None):
        raise UserError(f"--by and --beta are for pairs, and the records of {file} have one response each")
    return pairs


def groups_of(file: Path, field: str, index: np.ndarray) -> np.ndarray:
    """What the records at `index` (places in the file) hold under `field`, as text: (n,)."""
    scored = set(index.tolist())
    records = (record for place, (_, record) in enumerate(read_records(file)) if place in scored)
    values = [str(record.get(field, "(none)")) for record in records if isinstance(record, dict)]
    if not 1 < (count := len(set(values))) <= MOST_GROUPS:
        needed = f"one with 2 to {MOST_GROUPS} is needed"
        raise UserError(f"--by {field}: {count} different values in the records of {file}; {needed}")
    return np.array(values)


def _margins(loss: PreferenceLoss, origin: str, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """The margins (n,), and in words what they are."""
    if "chosen_reward" in columns:
        return columns["chosen_reward"] - columns["rejected_reward"], "reward of chosen - reward of rejected"
    if loss.needs_reference and "reference_chosen_logps" not in columns:
        meaning = "log pi(chosen) - log pi(rejected), nats; without --reference there is no reward"
        return columns["chosen_logps"] - columns["rejected_logps"], meaning
    names = [f"{model}{part}_logps" for model in ("", "reference_") for part in PARTS[1:]]
    names += [f"{part}_length" for part in PARTS[1:]]
    logps = PairLogps(*(torch.from_numpy(columns[name]) if name in columns else None for name in names))
    chosen, rejected = loss.rewards(logps)
    meaning = f"reward of chosen - reward of rejected under {loss.name}, {settings(type(loss), vars(loss))}"
    none = "" if loss.needs_reference else "; it has no reference"
    return (chosen - rejected).numpy(), f"{meaning} ({origin}){none}"


def summary(margins: np.ndarray, lengths: np.ndarray, groups: np.ndarray | None) -> str:
    """A table of the margins (n,). lengths (n, 2): tokens of both responses."""
    margins = margins.astype(np.float64)
    sets = [("all", margins)]
    sets += [(name, margins[groups == name]) for name in ([] if groups is None else np.unique(groups))]
    rows = [["", "pairs", "accuracy", "mean margin"]]
    rows += (
        [f"  {name[:28]}", f"{len(m)}", with_error(m > 0, ".3f"), with_error(m, ".4f")] for name, m in sets
    )
    longer = (np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2
    rows.append(["  baseline: longer response", f"{len(longer)}", with_error(longer, ".3f")])
    ties = f"{(margins == 0).sum()} margins are 0 and count as wrong"
    return aligned(rows) + f"\n  ({ties}; {(longer == 0.5).sum()} lengths are equal and count as half)"
