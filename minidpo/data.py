"""Preference files: from lines of text to `PreferencePair`s, with an account of what was left out.

    record      one JSON object of a file; formats.py knows the four shapes it may have
    prompt      everything the model is given; of an HH dialogue, all of it through the last "\\n\\nAssistant:"
    ending      what follows the prompt: `chosen` is the one people preferred, `rejected` the other

A record that cannot be read (broken JSON, a missing key) is an error: the file is not what it is taken
for. A record that reads well but can teach nothing (no shared prompt, no text in an ending, two equal
endings) is dropped and counted, for published files hold some.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from minidpo.chat import ChatTemplate
from minidpo.errors import UserError
from minidpo.formats import (
    ASSISTANT,
    BadRecord,
    PreferencePair,
    Unusable,
    margin_of,
    pair_of,
    shape_of,
    split_hh,
)
from minidpo.records import read_records
from minidpo.report import DataReport, FileReport, dropped_lines

__all__ = [
    "ASSISTANT",
    "DataReport",
    "FileReport",
    "PreferencePair",
    "read_preferences",
    "split_by_prompt",
    "split_hh",
]


def read_preferences(
    path: str | Path,
    report: DataReport | None = None,
    drop_identical: bool = True,
    template: ChatTemplate | None = None,
    skip_bad: bool = False,
) -> Iterator[PreferencePair]:
    """Yield the usable pairs of one file (.jsonl or .json, plain or gzipped), in file order.

    Of a .jsonl file one record is in memory at a time. The first record decides which shape (formats.py) the
    whole file has; messages are written out by `template`. What is dropped, why and on which lines is added to
    `report`; `drop_identical=False` keeps pairs whose endings are equal; `skip_bad=True` drops records that
    cannot be read as well, and counts them.
    Raises `UserError` (one line: file, line, what is wrong and what would be right) for a file or record
    that cannot be read, and for a file without a usable pair. It is raised when the reader gets there, so
    whoever writes output pair by pair must not take a part for the whole.
    """
    file = FileReport(str(path))
    report = DataReport() if report is None else report
    report.files.append(file)
    place = len(report.files) - 1
    for number, record in read_records(Path(path)):
        index = file.read
        file.read += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            shape = shape_of(record)
            file.format = file.format or shape
            if shape != file.format:
                raise BadRecord(
                    f"a record of {shape}", f" in a file that began with {file.format}; keep to one"
                )
            prompt, chosen, rejected, add_special = pair_of(record, shape, template, drop_identical)
        except BadRecord as bad:
            if not skip_bad:
                raise UserError(f"{path}:{number}: {bad}") from None
            file.dropped[bad.kind].append(number)
        except Unusable as reason:
            file.dropped[str(reason)].append(number)
        else:
            yield PreferencePair(prompt, chosen, rejected, index, margin_of(record), add_special, place)
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
        raise UserError(
            f"data.eval_pairs = {eval_count}, {eval_count} pairs to hold out of {len(prompts)}; give 0 to"
            f" {len(prompts) - 1}"
        )
    salt = str(seed).encode()
    keys = (prompt.encode() if isinstance(prompt, str) else prompt for prompt in prompts)
    digests = [hashlib.blake2b(key, digest_size=16, key=salt).digest() for key in keys]
    pairs = Counter(digests)
    held_out: set[bytes] = set()
    room = eval_count
    for digest in sorted(pairs):
        if pairs[digest] <= room:
            held_out.add(digest)
            room -= pairs[digest]
    if eval_count and not held_out:
        raise UserError(f"no prompt has as few as {eval_count} pairs, so none can be held out; hold out more")
    return [digest in held_out for digest in digests]
