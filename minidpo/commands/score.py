"""`python -m minidpo score`: what a model thinks of every pair of a preference file, one JSON line a pair.

Nothing is truncated: a pair that does not fit max_length is left out and counted, so every number is of a whole text.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from minidpo.chat import TEMPLATES
from minidpo.data import DataReport, read_preferences
from minidpo.dataset import require_fit
from minidpo.device import choose_device
from minidpo.errors import UserError
from minidpo.files import replacing_file, writing
from minidpo.hf_config import read_config
from minidpo.metrics import say
from minidpo.model import Transformer
from minidpo.packing import PairTokens, Wanted
from minidpo.reference import all_logps, of_every_pair
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
    if not Path(options.out).parent.is_dir() or Path(options.out).is_dir():
        raise UserError(f"--out {options.out}: a file in a directory that exists is needed")

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
    micro_tokens = max(options.micro_tokens, int(pairs.lengths.sum(axis=1).max()))

    def logps(of: Transformer, name: str) -> dict[str, np.ndarray]:
        values = all_logps(of, pairs, micro_tokens, device, options.dtype, f"{name}log-probs")
        return {f"{name}chosen_logps": values[:, 0], f"{name}rejected_logps": values[:, 1]}

    columns: dict[str, np.ndarray] = {"index": pairs.index}
    if options.reward_model:
        rewards = of_every_pair(
            lambda row: model.pair_rewards(row)[0],
            Wanted(rewards=True),
            pairs,
            micro_tokens,
            device,
            options.dtype,
            "rewards",
        )
        columns |= {"chosen_reward": rewards[:, 0], "rejected_reward": rewards[:, 1]}
        margins = rewards[:, 0] - rewards[:, 1]
    else:
        columns |= logps(model, "")
        columns |= {"chosen_length": pairs.lengths[:, 1], "rejected_length": pairs.lengths[:, 2]}
        margins = columns["chosen_logps"] - columns["rejected_logps"]
        if options.reference:
            columns |= logps(load_model(options.reference, device=device), "reference_")
            chosen_logratios = columns["chosen_logps"] - columns["reference_chosen_logps"]
            margins = chosen_logratios - (columns["rejected_logps"] - columns["reference_rejected_logps"])
    out = Path(options.out)
    with writing(out), replacing_file(out) as temporary, temporary.open("w") as file:
        for values in zip(*(column.tolist() for column in columns.values()), strict=True):
            file.write(json.dumps(dict(zip(columns, values, strict=True))) + "\n")
    longer = pairs.lengths[:, 1] > pairs.lengths[:, 2]
    say(
        f"{len(pairs)} pairs: chosen above rejected in {(margins > 0).mean():.3f}, longer ending chosen in"
        f" {longer.mean():.3f}; written to {options.out}"
    )


def _read_whole(path: Path, tokenizer: Tokenizer, max_length: int, template: str) -> PairTokens:
    report = DataReport()
    texts = read_preferences(path, report, drop_identical=False, template=tokenizer.chat_template(template))
    pairs = PairTokens.from_pairs(
        tokenize_pairs(texts, tokenizer, max_length, report=report, truncate=False, drop_identical=False)
    )
    for line in report.lines():
        say(line)
    return pairs
