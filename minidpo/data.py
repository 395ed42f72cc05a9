"""Preference files: from lines of text to `PreferencePair`s, with an account of what was left out.

    record      one line of a file: a JSON object
    dialogue    Anthropic's HH-RLHF text, "\n\nHuman: ...\n\nAssistant: ...", turn after turn
    prompt      everything the model is given; of a dialogue, all of it through the last "\n\nAssistant:"
    ending      what follows the prompt: `chosen` is the one people preferred, `rejected` the other

A record that cannot be read (broken JSON, a missing key) is an error: the file is not what it is taken
for. A record that reads well but can teach nothing (no shared prompt, no text in an ending, two equal
endings) is dropped and counted, for published files hold some.
"""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minidpo.errors import UserError

# With the blank line before it: "Assistant:" anywhere else is something that was said, not a turn.
ASSISTANT = "\n\nAssistant:"

HH_DIALOGUES = "HH dialogues (chosen, rejected)"
PROMPT_AND_ENDINGS = "prompt, chosen, rejected"

NO_TURN = "no '\\n\\nAssistant:' in a dialogue"
DIFFERENT_PROMPTS = "chosen and rejected differ before the last '\\n\\nAssistant:'"
EMPTY_ENDING = "nothing but blanks in an ending"
IDENTICAL = "chosen and rejected are identical"

_FIRST_FEW = 5
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell what UTF-8, and a tokenizer, cannot
_GZIP_MAGIC = b"\x1f\x8b"
_CONVERT = {  # without these arguments pandas reads the text "NA" as missing, "12" as a number
    ".parquet": "read_parquet({source!r})",
    ".csv": "read_csv({source!r}, keep_default_na=False, dtype=str)",
    ".json": "read_json({source!r}, dtype=False)",
}


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, two endings. `index`: the record's place in its file, from 0, blank lines not counted."""

    prompt: str
    chosen: str
    rejected: str
    index: int = field(default=-1, compare=False)


@dataclass
class FileReport:
    """What one file held: `read` counts records, `dropped` maps a reason to line numbers from 1."""

    path: str
    format: str = ""
    read: int = 0
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def kept(self) -> int:
        return self.read - sum(map(len, self.dropped.values()))


@dataclass
class DataReport:
    """What became of the records: one `FileReport` a file, then what the tokenizing stage adds.

    `tokenized` counts the pairs that stage was given; `lengths` holds theirs in tokens, EOS included, before
    any cut; `dropped` maps a reason to record indices. The other counts are of the kept pairs, as they go to
    the model. `truncated_endings` counts endings, of which a pair has two.
    """

    files: list[FileReport] = field(default_factory=list)
    tokenized: int = 0
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    truncated_prompts: int = 0
    truncated_endings: int = 0
    prompt_tokens: int = 0
    ending_tokens: int = 0
    lengths: dict[str, array] = field(
        default_factory=lambda: {part: array("I") for part in ("prompt", "chosen", "rejected")}
    )

    @property
    def kept(self) -> int:
        return self.tokenized - sum(map(len, self.dropped.values()))

    def lines(self) -> Iterator[str]:
        """The report as printable lines."""
        for file in self.files:
            yield f"{file.path}: {file.format}: {file.read} records read, {file.kept} kept"
            yield from ("  " + line for line in dropped_lines(file.dropped, "line"))
        if not self.tokenized:
            return
        yield f"tokenized {self.tokenized} pairs, {self.kept} kept"
        yield from ("  " + line for line in dropped_lines(self.dropped, "record"))
        yield f"  truncated {self.truncated_prompts} prompts and {self.truncated_endings} endings"
        for part, lengths in self.lengths.items():
            p5, p50, p95, longest = (round(p) for p in np.percentile(lengths, (5, 50, 95, 100)))
            yield f"  {part} tokens before any cut: 5% {p5}, median {p50}, 95% {p95}, longest {longest}"
        if total := self.prompt_tokens + self.ending_tokens:
            yield f"  endings are {self.ending_tokens / total:.0%} of the {total} tokens kept"


def dropped_lines(dropped: dict[str, list[int]], unit: str) -> Iterator[str]:
    """One line a reason: how many were dropped, and the first few of their places, called `unit`."""
    for reason, places in dropped.items():
        first = ", ".join(map(str, places[:_FIRST_FEW])) + (", ..." if len(places) > _FIRST_FEW else "")
        yield f"dropped {len(places)}: {reason} ({unit} {first})"


def split_hh(chosen_text: str, rejected_text: str) -> PreferencePair:
    """Split two HH dialogues into their prompt and endings, each on its own last "\\n\\nAssistant:".

    The prompt ends with that marker and the endings keep their leading space, so that prompt + ending is
    the text as it was published. Whatever follows the marker is text, "Human:" included.
    Raises `ValueError` where a dialogue has no such turn, where the two do not share the whole prompt, or
    where an ending is blank. Cutting at the longest common prefix would never fail, and be wrong: two
    replies that begin alike would leave half a word in the prompt.
    """
    chosen_cut, rejected_cut = chosen_text.rfind(ASSISTANT), rejected_text.rfind(ASSISTANT)
    if chosen_cut < 0 or rejected_cut < 0:
        raise ValueError(NO_TURN)
    if chosen_text[:chosen_cut] != rejected_text[:rejected_cut]:
        raise ValueError(DIFFERENT_PROMPTS)
    end = chosen_cut + len(ASSISTANT)
    pair = PreferencePair(chosen_text[:end], chosen_text[end:], rejected_text[end:])
    if not (pair.chosen.strip() and pair.rejected.strip()):
        raise ValueError(EMPTY_ENDING)
    return pair


def read_preferences(
    path: str | Path, report: DataReport | None = None, drop_identical: bool = True
) -> Iterator[PreferencePair]:
    """Yield the usable pairs of one .jsonl or .jsonl.gz file, in file order, one record in memory at a time.

    A record has `chosen` and `rejected` dialogues (HH), or the strings `prompt`, `chosen`, `rejected`;
    other keys are not looked at. The first record decides for the file. What is dropped, why and on which
    lines is added to `report`; `drop_identical=False` keeps pairs whose endings are equal.
    Raises `UserError` (one line: file, line, what is wrong and what would be right) for a file or record
    that cannot be read, and for a file without a usable pair. It is raised when the reader gets there, so
    whoever writes output pair by pair must not take a part for the whole.
    """
    file = FileReport(str(path))
    if report is not None:
        report.files.append(file)
    for number, line in _lines(Path(path)):
        try:
            record = _record(line)
            shape = _shape(record)
            file.format = file.format or shape
            if shape != file.format:
                raise ValueError(f"a record of {shape} in a file that began with {file.format}; keep to one")
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        index = file.read
        file.read += 1
        try:
            prompt, chosen, rejected = _texts(record, drop_identical)
        except ValueError as reason:
            file.dropped[str(reason)].append(number)
            continue
        yield PreferencePair(prompt, chosen, rejected, index)
    if not file.read:
        raise UserError(f"{path}: no record in the file; one JSON object a line is needed")
    if not file.kept:
        reasons = ", ".join(dropped_lines(file.dropped, "line"))
        raise UserError(f"{path}: no usable pair in {file.read} records ({reasons}); one at least is needed")


def split_by_prompt(prompts: Sequence[str | bytes], eval_count: int, seed: int) -> list[bool]:
    """Choose the pairs to hold out: `prompts` has one key a pair; True where the pair is held out.

    A prompt is held out with all its pairs or not at all. Prompts are ranked by a hash of (seed, prompt)
    and taken while they fit into `eval_count`, so the order of the file changes nothing; fewer than
    `eval_count` pairs are held out only where repeated prompts leave no exact sum.
    Raises `UserError` where nothing would be left on either side.
    """
    if not 0 <= eval_count < len(prompts):
        raise UserError(f"{eval_count} pairs to hold out of {len(prompts)}; give 0 to {len(prompts) - 1}")
    salt = str(seed).encode()
    keys = [prompt.encode() if isinstance(prompt, str) else prompt for prompt in prompts]
    digests = [hashlib.blake2b(key, digest_size=16, key=salt).digest() for key in keys]
    held_out: set[bytes] = set()
    room = eval_count
    for digest, pairs in sorted(Counter(digests).items()):
        if pairs <= room:
            held_out.add(digest)
            room -= pairs
    if eval_count and not held_out:
        raise UserError(f"no prompt has as few as {eval_count} pairs, so none can be held out; hold out more")
    return [digest in held_out for digest in digests]


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a plain or gzipped file that are not blank, numbered from 1 as an editor does."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a .jsonl or .jsonl.gz file in it")
    if path.suffix in _CONVERT:
        read, target = _CONVERT[path.suffix].format(source=str(path)), str(path.with_suffix(".jsonl"))
        command = f"import pandas; pandas.{read}.to_json({target!r}, orient='records', lines=True)"
        raise UserError(f'{path}: {path.suffix} is not read; convert it: python -c "{command}"')
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"{path}: an unknown kind of file; .jsonl or .jsonl.gz is read")
    number = 0
    try:
        with open(path, "rb") as raw:
            # By content: downloads that a browser unpacked keep their .gz, and the reverse.
            lines = gzip.open(raw) if raw.peek(2)[:2] == _GZIP_MAGIC else raw
            for number, line in enumerate(lines, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: torn gzip data ({error}); fetch the file again") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a .jsonl or .jsonl.gz file") from None


def _record(line: bytes) -> dict:
    """One JSON object from one line. Raises `ValueError` saying what is wrong and what would be right."""
    try:
        record = json.loads(line.decode("utf-8").rstrip())
    except json.JSONDecodeError as error:
        where = f"column {error.colno} ({error.msg})"
        raise ValueError(f"broken JSON at {where}; give one object a line") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, 100,000 brackets
        raise ValueError(f"not JSON in UTF-8 ({error}); give one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}; give one object with chosen and rejected a line")
    return record


def _shape(record: dict) -> str:
    """The format of one record. Raises `ValueError` for a missing key and for a value that is not text."""
    keys = ("prompt", "chosen", "rejected") if "prompt" in record else ("chosen", "rejected")
    for key in keys:
        if key not in record:
            raise ValueError(f"no key {key!r}; a record has chosen, rejected, and prompt unless it is HH")
        value = record[key]
        if not isinstance(value, str):
            raise ValueError(f"{key!r} is of type {type(value).__name__}; give a string")
        if _LONE_SURROGATE.search(value):
            raise ValueError(f"{key!r} has half a surrogate pair (\\ud800 to \\udfff); give whole characters")
    return PROMPT_AND_ENDINGS if "prompt" in record else HH_DIALOGUES


def _texts(record: dict[str, str], drop_identical: bool) -> tuple[str, str, str]:
    """Prompt, chosen, rejected. Raises `ValueError` with the reason for which the record is dropped."""
    prompt, chosen, rejected = record.get("prompt", ""), record["chosen"], record["rejected"]
    if "prompt" not in record:
        pair = split_hh(chosen, rejected)
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if not (chosen.strip() and rejected.strip()):
        raise ValueError(EMPTY_ENDING)
    if drop_identical and chosen == rejected:
        raise ValueError(IDENTICAL)
    return prompt, chosen, rejected
