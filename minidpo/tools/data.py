"""`python -m minidpo data`: what of preference files would be trained on, and how it is read.

    python -m minidpo data pairs.jsonl --model models/mine
    python -m minidpo data configs/hh_dpo.toml --data.train=pairs.jsonl --model.path=models/mine

The second form reads as that run would. Said of each file: what its records are read as, from which keys,
and which keys are not read; records read and dropped (by reason, with the first line numbers); truncated
prompts and responses, and lengths; then its first pair as the model sees it. --out=FILE writes the pairs as
other programs read them: prompt, chosen and rejected, in text or messages; of one response, prompt and
completion. --held-out=FILE writes the records that the run would hold out, as they stand, for `score` and
`explain`. Nothing else is kept unless --cache (or data.cache) is given.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minidpo.config import load_either_config
from minidpo.data import DataReport, PairTokens, Tokenizer, load_pairs, read_records, renamed, require_fit
from minidpo.data.paths import data_files
from minidpo.data.preference_files import read_files
from minidpo.data.report import PARTS
from minidpo.data.shapes import shape_of
from minidpo.errors import UserError
from minidpo.files import require_place, write_json_lines
from minidpo.log import print0
from minidpo.model import read_config
from minidpo.sections import DataSection, DPOConfig, ModelSection, RewardConfig
from minidpo.settings import check_fields, keys_of
from minidpo.tools.reading import add_reading_options, add_settings, reading_section
from minidpo.training.pairs import require_usable
from minidpo.training.reward_scorer import text_after

# The keys of [data] that have an option of their own, beside those of add_reading_options.
OPTIONS = "max_length max_prompt_length template pairs_per_prompt min_margin limit skip_bad cache".split()


def main(arguments: list[str]) -> None:
    outputs = argparse.ArgumentParser(prog="python -m minidpo data", add_help=False, allow_abbrev=False)
    outputs.add_argument("--out", metavar="FILE", help="write the pairs there, uncut, one JSON line each")
    about = "write the records that a run would hold out there; goes with its configuration"
    outputs.add_argument("--held-out", metavar="FILE", help=about)
    options, others = outputs.parse_known_args(arguments)
    of_run = any(argument.endswith(".toml") for argument in arguments)
    if options.held_out is not None and not of_run:
        form = "python -m minidpo data RUN.toml --data.train=FILE --model.path=DIR --held-out=FILE"
        raise UserError(f"--held-out goes with the configuration of the run that holds them out: {form}")
    config = load_either_config(others) if of_run else _of_files(arguments, outputs)
    files = [*config.data.train, *config.data.eval]
    for option, path in (("--out", options.out), ("--held-out", options.held_out)):
        if path is not None:
            require_place(option, path, *files, *data_files(files))
    tokenizer = Tokenizer.from_pretrained(config.model.path, isinstance(config, RewardConfig))
    if of_run:
        require_fit("model", read_config(Path(config.model.path)), tokenizer, config.data.max_length)
    train, held_out = load_pairs(config.data, tokenizer, config.run.seed, cache=None)
    template = tokenizer.chat_template(config.data.template, config.data.date)
    show_first(train, tokenizer)
    if of_run:
        require_usable(config, tokenizer, train, held_out)
    if options.out is not None:
        texts = read_files(train.files, config.data, tokenizer, template, DataReport())
        write_json_lines(Path(options.out), (pair.record for pair in texts))
        print0(f"usable pairs, one per line, written to {options.out}")
    if options.held_out is not None:
        write_json_lines(Path(options.held_out), held_out_records(held_out, config.data.columns))
        print0(f"{len(held_out)} pairs held out, their records written to {options.held_out}")


def _of_files(arguments: list[str], outputs: argparse.ArgumentParser) -> DPOConfig:
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(outputs.prog, None, __doc__, None, [outputs], as_it_stands)
    add, keys = parser.add_argument, keys_of(DataSection)
    add("files", metavar="FILE", nargs="+", help="preference files, or directories of them")
    add("--model", metavar="DIR", required=True, help="whose tokenizer and chat template to use")
    add_reading_options(add)
    add_settings(add, {name: keys[name] for name in OPTIONS}, "as the key of [data]")
    options = parser.parse_args(arguments)
    given: dict[str, Any] = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    data = reading_section(options, options.model, train=options.files, eval_pairs=0, **given)
    if options.max_prompt_length is None:
        data.max_prompt_length = min(data.max_prompt_length, data.max_length - 1)
    try:
        check_fields("data", data)
    except ValueError as error:
        raise UserError(str(error)) from None
    return DPOConfig(model=ModelSection(options.model), data=data)


def show_first(pairs: PairTokens, tokenizer: Tokenizer) -> None:
    """Print each file's first pair with its special tokens, each text between quotes, as it was cut."""
    parts, what = (PARTS, "pair") if pairs.responses > 1 else (("prompt", "response"), "response")
    for row in sorted(np.unique(pairs.columns()["file"], return_index=True)[1].tolist()):
        pair = pairs.pair(row)
        print0(f"the first {what}, {pairs.records(np.array([row]))}, as the model sees it:")
        for part, ids in zip(parts, (pair.prompt, *pair.responses), strict=True):
            text = text_after(tokenizer, [] if part == "prompt" else pair.prompt, ids, special_tokens=True)
            shown = repr(text) if len(text) <= 400 else f"{text[:200]!r} ... {text[-200:]!r}"
            print0(f"  {part}, {len(ids)} tokens: {shown}")


def held_out_records(pairs: PairTokens, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The records that `pairs` were made of, as their files have them. Raises `UserError` for two shapes."""
    shapes = set[str]()
    for place, file in enumerate(pairs.files):
        held_out = set(pairs.index[pairs.file == place].tolist())
        for index, (_, record) in enumerate(read_records(Path(file))):
            if index in held_out and isinstance(record, dict):
                shapes.add(shape_of(renamed(record, columns), columns).name)
                if len(shapes) > 1:
                    raise UserError("--held-out: records of two shapes; train on what --out writes of all")
                yield record
