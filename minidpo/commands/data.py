"""`python -m minidpo data`: the report with which every run opens, alone: what would be trained on.

    python -m minidpo data configs/hh_dpo.toml --data.train=pairs.jsonl --model.path=models/mine     as that run would
    ... --held-out=held_out.jsonl     and the records that it would hold out, as they stand, for `score` and `explain`
    python -m minidpo data pairs.jsonl --model models/mine

Records read and dropped (by reason, with the first line numbers), truncated prompts and endings, length percentiles,
and the endings' share of all tokens. Nothing is kept unless --cache (or data.cache) names a directory.
"""

import argparse
import json
from pathlib import Path

from minidpo.chat import TEMPLATES
from minidpo.config import load_either_config
from minidpo.data import DataReport
from minidpo.dataset import load_pairs, stream_pairs, tokenized
from minidpo.errors import UserError
from minidpo.files import replacing_file, require_place, writing
from minidpo.formats import shape_of
from minidpo.hf_config import read_config
from minidpo.metrics import say
from minidpo.records import read_records
from minidpo.sections import DataSection
from minidpo.token_store import PairTokens
from minidpo.tokenizer import Tokenizer


def main(arguments: list[str]) -> None:
    if any(argument.endswith(".toml") for argument in arguments):
        parser = argparse.ArgumentParser(prog="python -m minidpo data", add_help=False, allow_abbrev=False)
        parser.add_argument("--held-out", metavar="FILE")
        options, others = parser.parse_known_args(arguments)
        config = load_either_config(others)
        if options.held_out is not None:
            require_place("--held-out", options.held_out)
            for file in (*config.data.train, *config.data.eval):
                if Path(file).resolve() == Path(options.held_out).resolve():
                    raise UserError(f"--held-out {options.held_out}: is a file of the data; name a new one")
        model = Path(config.model.path)
        tokenizer = Tokenizer.from_directory(model)
        _, held_out = load_pairs(config.data, config.optim, tokenizer, read_config(model), config.run.seed)
        if options.held_out is not None:
            write_records(Path(options.held_out), held_out)
        return
    default = DataSection()
    parser = argparse.ArgumentParser(
        prog="python -m minidpo data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help="preference files (.jsonl or .json, plain or .gz)"
    )
    parser.add_argument(
        "--model", metavar="DIR", required=True, help="whose tokenizer and chat template to use"
    )
    parser.add_argument("--max-length", type=int, default=default.max_length, help="as data.max_length")
    parser.add_argument("--max-prompt-length", type=int, help="as data.max_prompt_length")
    parser.add_argument("--template", default=default.template, choices=TEMPLATES, help="as data.template")
    parser.add_argument("--skip-bad", action="store_true", help="as data.skip_bad")
    parser.add_argument("--cache", metavar="DIR", help="as data.cache: keep the token ids for runs to read")
    options = parser.parse_args(arguments)
    data = DataSection(
        max_length=options.max_length,
        max_prompt_length=options.max_prompt_length or min(default.max_prompt_length, options.max_length - 1),
        template=options.template,
        skip_bad=options.skip_bad,
    )
    tokenizer = Tokenizer.from_directory(options.model)
    if options.cache:
        with tokenized("train", options.files, data, tokenizer, Path(options.cache)):
            return
    report = DataReport()
    for _ in stream_pairs("train", options.files, data, tokenizer, report):
        pass  # only counted: a report of any number of pairs needs no memory for them
    for line in report.lines():
        say(line)


def write_records(path: Path, pairs: PairTokens) -> None:
    """The records that `pairs` were made of, as their files have them, one JSON line each."""
    shapes = set()
    with writing(path), replacing_file(path) as temporary, temporary.open("w") as out:
        for place, file in enumerate(pairs.files):
            wanted = set(pairs.index[pairs.file == place].tolist())
            for index, (_, record) in enumerate(read_records(Path(file))):
                if index in wanted and isinstance(record, dict):
                    shapes.add(shape_of(record))
                    out.write(json.dumps(record) + "\n")
        if len(shapes) > 1:
            raise UserError(
                f"--held-out {path}: records of {' and '.join(sorted(shapes))}; a file keeps to one"
            )
    say(f"{len(pairs)} records held out, written to {path}")
