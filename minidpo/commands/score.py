"""`python -m minidpo score`: what a model thinks of every pair of a preference file, one JSON line a pair.

Nothing is truncated: a pair that does not fit max_length is left out and counted, so every number is of a whole text.
Printed is what the set shows as a whole: accuracy with its standard error, mean margin, calibration, two baselines.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from minidpo.chat import TEMPLATES
from minidpo.commands.score_summary import groups_of, summary
from minidpo.config import loss_of_run
from minidpo.data import DataReport, read_preferences
from minidpo.dataset import longest_pair, require_fit
from minidpo.device import choose_device
from minidpo.errors import UserError
from minidpo.files import replacing_file, require_place, writing
from minidpo.hf_config import read_config
from minidpo.judge import all_rewards
from minidpo.metrics import say
from minidpo.model import Transformer
from minidpo.packing import PairTokens
from minidpo.reference import all_logps
from minidpo.reward import RewardModel
from minidpo.sections import PreferenceLossSection
from minidpo.tokenizer import Tokenizer, tokenize_pairs
from minidpo.weights import load_model, load_reward_model


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo score", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="DIR", help="a language model: log-probs of both endings")
    which.add_argument("--reward-model", metavar="DIR", help="a reward model: rewards of both endings")
    parser.add_argument("--reference", metavar="DIR", help="with --model: this model's log-probs too")
    parser.add_argument("--data", metavar="FILE", required=True, help="preference file (.jsonl, .jsonl.gz)")
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="where the scores go, one JSON line a pair"
    )
    parser.add_argument(
        "--by", metavar="FIELD", help="accuracy also for each value of this field of the records"
    )
    parser.add_argument(
        "--beta",
        type=float,
        help="with --reference: reward = beta * log-ratio in the summary (default: the run's, else 0.1)",
    )
    parser.add_argument(
        "--max-length", type=int, help="longest prompt + ending scored (default: the model's)"
    )
    parser.add_argument(
        "--template",
        default="model",
        choices=TEMPLATES,
        help="how messages become text (default: the model's own)",
    )
    parser.add_argument("--micro-tokens", type=int, default=8192, help="tokens one forward pass holds")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    options = parser.parse_args(arguments)
    if options.reference and options.reward_model:
        raise UserError("--reference goes with --model; a reward model needs none")
    if options.beta is not None and not options.reference:
        raise UserError("--beta goes with --reference: without one there is no log-ratio to scale")
    of_run = loss_of_run(Path(options.model)) if options.model else None
    beta = (of_run or PreferenceLossSection()).beta if options.beta is None else options.beta
    if not 0 < beta < float("inf"):
        raise UserError(f"--beta {beta}; it must be > 0 and finite")
    require_place("--out", options.out)

    device = choose_device(options.device)
    directory = Path(options.reward_model or options.model)
    model = (load_reward_model if options.reward_model else load_model)(directory, device=device)
    limit = model.config.max_length if options.max_length is None else options.max_length
    if limit < 2:
        raise UserError(f"--max-length {limit}; it must be at least 2")
    tokenizer = Tokenizer.from_directory(directory)
    require_fit("model", model.config, tokenizer, limit)
    if options.reference:
        require_fit("reference", read_config(Path(options.reference)), tokenizer, limit)
    pairs = _read_whole(Path(options.data), tokenizer, limit, options.template)
    groups = groups_of(Path(options.data), options.by, pairs.index) if options.by else None
    micro_tokens = max(options.micro_tokens, longest_pair(pairs))

    def logps(of: Transformer, name: str) -> dict[str, np.ndarray]:
        values = all_logps(of, pairs, micro_tokens, device, options.dtype, f"{name}log-probs")
        return {f"{name}chosen_logps": values[:, 0], f"{name}rejected_logps": values[:, 1]}

    columns: dict[str, np.ndarray] = {"index": pairs.index}
    if isinstance(model, RewardModel):
        rewards = all_rewards(model, pairs, micro_tokens, device, options.dtype, "rewards")
        columns |= {"chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1]}
        margins, meaning = rewards[:, 0] - rewards[:, 1], "reward of chosen - reward of rejected"
    else:
        columns |= logps(model, "")
        columns |= {"chosen_length": pairs.lengths[:, 1], "rejected_length": pairs.lengths[:, 2]}
        margins = columns["chosen_logps"] - columns["rejected_logps"]
        meaning = "log pi(chosen) - log pi(rejected), nats; without --reference no reward and no calibration"
        if options.reference:
            columns |= logps(load_model(options.reference, device=device), "reference_")
            chosen_logratios = columns["chosen_logps"] - columns["reference_chosen_logps"]
            rejected_logratios = columns["rejected_logps"] - columns["reference_rejected_logps"]
            margins = beta * (chosen_logratios - rejected_logratios)
            meaning = f"beta * (log-ratio of chosen - log-ratio of rejected), beta {beta:g}"
    out = Path(options.out)
    with writing(out), replacing_file(out) as temporary, temporary.open("w") as file:
        for values in zip(*(column.tolist() for column in columns.values()), strict=True):
            file.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")
    are_logits = bool(options.reward_model or options.reference)
    for line in summary(margins, meaning, pairs.lengths[:, 1:], groups, are_logits):
        say(line)
    say(f"{len(pairs)} pairs, one a line, written to {options.out}")


def _read_whole(path: Path, tokenizer: Tokenizer, max_length: int, template: str) -> PairTokens:
    report = DataReport()
    texts = read_preferences(path, report, drop_identical=False, template=tokenizer.chat_template(template))
    pairs = PairTokens.from_pairs(
        tokenize_pairs(texts, tokenizer, max_length, report=report, truncate=False, drop_identical=False)
    )
    for line in report.lines():
        say(line)
    return pairs
