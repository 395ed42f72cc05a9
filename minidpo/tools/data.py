"""`python -m minidpo data`: what of preference files would be trained on, and how it is read.

    python -m minidpo data pairs.jsonl --model models/mine
                                         with --out=FILE also the pairs as other programs read them: prompt,
                                         chosen and rejected, in text or messages; of one response, prompt
                                         and completion
    python -m minidpo data configs/hh_dpo.toml --data.train=pairs.jsonl --model.path=models/mine
                                         as that run would have it: the report with which it opens; with
                                         --held-out=FILE also the records that it would hold out, as they
                                         stand, for `score` and `explain`

Said of each file: what its records are read as, from which keys, and which keys are not read; records read
and dropped (by reason, with the first line numbers); truncated prompts and responses, and lengths; then its
first pair as the model sees it. Nothing is kept unless --cache (or data.cache) names a directory.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from minidpo.config import load_either_config
from minidpo.data import (
    BadRecord,
    DataReport,
    PairTokens,
    Tokenizer,
    load_pairs,
    read_records,
    require_fit,
)
from minidpo.data.paths import data_files
from minidpo.data.preference_files import format_of, read_files
from minidpo.data.report import PARTS
from minidpo.errors import UserError
from minidpo.files import replacing_file, require_place, write_json_lines, writing
from minidpo.log import print0
from minidpo.model import read_config
from minidpo.sections import TEMPLATES, DataSection, RewardConfig
from minidpo.settings import check_fields
from minidpo.tools.reading import add_reading_options, reading_section
from minidpo.training.pairs import require_usable
from minidpo.training.reward_scorer import text_after


def main(arguments: list[str]) -> None:
    if any(argument.endswith(".toml") for argument in arguments):
        _as_a_run_would(arguments)
        return
    options = _options(arguments)
    data = reading_section(
        options,
        options.model,
        train=options.files,
        eval_pairs=0,
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length
        or min(DataSection().max_prompt_length, options.max_length - 1),
        template=options.template,
        pairs_per_prompt=options.pairs_per_prompt,
        min_margin=options.min_margin,
        limit=options.limit,
        skip_bad=options.skip_bad,
        cache=options.cache,
    )
    try:
        check_fields("data", data)
    except ValueError as error:
        raise UserError(str(error)) from None
    if options.out is not None:
        _require_new("--out", options.out, options.files)
    tokenizer = Tokenizer.from_pretrained(options.model)
    pairs, _ = load_pairs(data, tokenizer, seed=0, cache=None)
    show_first(pairs, tokenizer)
    if options.out is not None:
        write_pairs(Path(options.out), pairs.files, data, tokenizer)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, DataSection()
    add("files", metavar="FILE", nargs="+", help="preference files, or directories of them")
    add("--model", metavar="DIR", required=True, help="whose tokenizer and chat template to use")
    add("--out", metavar="FILE", help="write the pairs there, uncut, one JSON line each")
    add("--max-length", type=int, default=default.max_length, help="as data.max_length")
    add("--max-prompt-length", type=int, help="as data.max_prompt_length")
    add("--template", default=default.template, choices=TEMPLATES, help="as data.template")
    add_reading_options(add)
    choices = ("best-worst", "all")
    add("--pairs-per-prompt", default=choices[0], choices=choices, help="as data.pairs_per_prompt")
    add("--min-margin", type=float, default=default.min_margin, help="as data.min_margin")
    add("--limit", type=int, default=default.limit, help="as data.limit")
    add("--skip-bad", action="store_true", help="as data.skip_bad")
    add("--cache", metavar="DIR", default="", help="as data.cache: keep the token ids for runs to read")
    return parser.parse_args(arguments)


def _as_a_run_would(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo data", add_help=False, allow_abbrev=False)
    parser.add_argument("--held-out", metavar="FILE")
    options, others = parser.parse_known_args(arguments)
    config = load_either_config(others)
    if options.held_out is not None:
        _require_new("--held-out", options.held_out, [*config.data.train, *config.data.eval])
    tokenizer = Tokenizer.from_pretrained(config.model.path, isinstance(config, RewardConfig))
    require_fit("model", read_config(Path(config.model.path)), tokenizer, config.data.max_length)
    train, held_out = load_pairs(config.data, tokenizer, config.run.seed, cache=None)
    show_first(train, tokenizer)
    require_usable(config, tokenizer, train, held_out)
    if options.held_out is not None:
        write_records(Path(options.held_out), held_out, config.data)


def _require_new(option: str, path: str, files: list[str]) -> None:
    """Raises `UserError` unless a file can be written at `path` that is none of the data."""
    require_place(option, path)
    taken = [Path(name).resolve() for name in (*files, *data_files(files))]
    out = Path(path).resolve()
    if out in taken or any(each.is_dir() and out.is_relative_to(each) for each in taken):
        what = "is a file of the data, or in a directory of the data"
        raise UserError(f"{option} {path}: {what}; name a new one elsewhere")


def show_first(pairs: PairTokens, tokenizer: Tokenizer) -> None:
    """Print each file's first pair with its special tokens, each text between quotes, as it was cut."""
    parts = PARTS if pairs.responses > 1 else ("prompt", "response")
    of_file = np.zeros(len(pairs)) if pairs.file is None else pairs.file
    for row in sorted(np.unique(of_file, return_index=True)[1].tolist()):
        bounds = pairs.bounds[row].tolist()
        prompt = pairs.ids[bounds[0] : bounds[1]].tolist()
        print0(f"the first pair, {pairs.records(np.array([row]))}, as the model sees it:")
        for part, start, end in zip(parts, bounds, bounds[1:], strict=False):
            ids = pairs.ids[start:end].tolist()
            text = text_after(tokenizer, [] if part == "prompt" else prompt, ids, special_tokens=True)
            print0(f"  {part}, {len(ids)} tokens: {_shortened(text)}")


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 400 else f"{text[:200]!r} ... {text[-200:]!r}"


def write_pairs(path: Path, files: Sequence[str], data: DataSection, tokenizer: Tokenizer) -> None:
    """The usable pairs of `files` as text or messages, before any cut, one JSON line each."""
    texts = read_files(files, data, tokenizer, tokenizer.chat_template(data.template), DataReport())
    written = 0

    def rows() -> Iterator[dict]:
        nonlocal written
        for pair in texts:
            written += 1
            yield pair.record

    write_json_lines(path, rows())
    print0(f"{written} pairs, one per line, written to {path}")


def write_records(path: Path, pairs: PairTokens, data: DataSection) -> None:
    """The records that `pairs` were made of, as their files have them, one JSON line each."""
    shapes, written = set(), 0
    with writing(path), replacing_file(path) as temporary, temporary.open("w") as out:
        for place, file in enumerate(pairs.files):
            held_out = set(pairs.index[pairs.file == place].tolist())
            for index, (_, record) in enumerate(read_records(Path(file))):
                if index in held_out and not isinstance(record, BadRecord):
                    shapes.add(format_of(record, data))
                    out.write(json.dumps(record) + "\n")
                    written += 1
        if len(shapes) > 1:
            both = " and ".join(sorted(shapes))
            raise UserError(f"--held-out {path}: records of {both}; a file keeps to one")
    print0(f"{written} records held out, written to {path}")
