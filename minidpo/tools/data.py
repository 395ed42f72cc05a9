"""`python -m minidpo data`: the report with which every run opens, alone: what would be trained on.

    python -m minidpo data configs/hh_dpo.toml --data.train=pairs.jsonl --model.path=models/mine
                                         as that run would have it; with --held-out=FILE also the records that
                                         it would hold out, as they stand, for `score` and `explain`
    python -m minidpo data pairs.jsonl --model models/mine

Records read and dropped (by reason, with the first line numbers), keys that are not read, truncated prompts
and responses, median and longest lengths, and the share of all tokens that are responses; then the first pair
as the model sees it. Nothing is kept unless --cache (or data.cache) names a directory.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from minidpo.config import load_either_config
from minidpo.data import (
    PairTokens,
    Tokenizer,
    load_pairs,
    read_records,
    require_fit,
    require_messages,
    shape_of,
)
from minidpo.data.paths import data_files
from minidpo.data.report import PARTS
from minidpo.errors import UserError
from minidpo.files import replacing_file, require_place, writing
from minidpo.log import print0
from minidpo.model import read_config
from minidpo.sections import TEMPLATES, DataSection, RewardConfig
from minidpo.training.reward_scorer import text_after


def main(arguments: list[str]) -> None:
    if any(argument.endswith(".toml") for argument in arguments):
        _as_a_run_would(arguments)
        return
    parser = argparse.ArgumentParser(
        prog="python -m minidpo data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, DataSection()
    add("files", metavar="FILE", nargs="+", help="preference files, or directories of them")
    add("--model", metavar="DIR", required=True, help="whose tokenizer and chat template to use")
    add("--max-length", type=int, default=default.max_length, help="as data.max_length")
    add("--max-prompt-length", type=int, help="as data.max_prompt_length")
    add("--template", default=default.template, choices=TEMPLATES, help="as data.template")
    add("--skip-bad", action="store_true", help="as data.skip_bad")
    add("--cache", metavar="DIR", default="", help="as data.cache: keep the token ids for runs to read")
    options = parser.parse_args(arguments)
    data = DataSection(
        train=options.files,
        eval_pairs=0,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length or min(default.max_prompt_length, options.max_length - 1),
        template=options.template,
        skip_bad=options.skip_bad,
        cache=options.cache,
    )
    tokenizer = Tokenizer.from_pretrained(options.model)
    pairs, _ = load_pairs(data, tokenizer, seed=0, cache=None)
    show_first(pairs, tokenizer)


def _as_a_run_would(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo data", add_help=False, allow_abbrev=False)
    parser.add_argument("--held-out", metavar="FILE")
    options, others = parser.parse_known_args(arguments)
    config = load_either_config(others)
    if options.held_out is not None:
        require_place("--held-out", options.held_out)
        named = [*config.data.train, *config.data.eval]
        taken = [Path(name).resolve() for name in (*named, *data_files(named))]
        out = Path(options.held_out).resolve()
        if out in taken or any(path.is_dir() and out.is_relative_to(path) for path in taken):
            what = "is a file of the data, or in a directory of the data"
            raise UserError(f"--held-out {options.held_out}: {what}; name a new one elsewhere")
    tokenizer = Tokenizer.from_pretrained(config.model.path, isinstance(config, RewardConfig))
    require_fit("model", read_config(Path(config.model.path)), tokenizer, config.data.max_length)
    train, held_out = load_pairs(config.data, tokenizer, config.run.seed, cache=None)
    template = tokenizer.chat_template(config.data.template)
    require_messages(config.named("data.template"), template, train, tokenizer)
    show_first(train, tokenizer)
    if options.held_out is not None:
        write_records(Path(options.held_out), held_out)


def show_first(pairs: PairTokens, tokenizer: Tokenizer) -> None:
    """Print the first pair with its special tokens, each text between quotes, as it was cut."""
    bounds = pairs.bounds[0].tolist()
    prompt = pairs.ids[bounds[0] : bounds[1]].tolist()
    print0(f"the first pair, {pairs.records(np.array([0]))}, as the model sees it:")
    for part, start, end in zip(PARTS, bounds, bounds[1:], strict=False):
        ids = pairs.ids[start:end].tolist()
        text = text_after(tokenizer, [] if part == "prompt" else prompt, ids, special_tokens=True)
        print0(f"  {part}, {len(ids)} tokens: {_shortened(text)}")


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 400 else f"{text[:200]!r} ... {text[-200:]!r}"


def write_records(path: Path, pairs: PairTokens) -> None:
    """The records that `pairs` were made of, as their files have them, one JSON line each."""
    shapes = set()
    with writing(path), replacing_file(path) as temporary, temporary.open("w") as out:
        for place, file in enumerate(pairs.files):
            held_out = set(pairs.index[pairs.file == place].tolist())
            for index, (_, record) in enumerate(read_records(Path(file))):
                if index in held_out and isinstance(record, dict):
                    shapes.add(shape_of(record))
                    out.write(json.dumps(record) + "\n")
        if len(shapes) > 1:
            both = " and ".join(sorted(shapes))
            raise UserError(f"--held-out {path}: records of {both}; a file keeps to one")
    print0(f"{len(pairs)} records held out, written to {path}")
