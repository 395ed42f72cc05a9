"""Files to records: .jsonl (one JSON object per line) and .json (a list of objects), plain or gzipped.

A file that cannot be read at all is a `UserError`. What is wrong with a single record is yielded as a
`BadRecord` in its place, so that the caller may skip it. Nothing here knows what a record should hold.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from minidpo.errors import UserError

READ = ".jsonl or .json, plain or .gz"

# A preference of a million tokens is about 4 MB. Far beyond that is a broken file, or a small gzip file made
# to fill the memory of whoever opens it.
LONGEST_RECORD = 16 * 2**20

_BLANK = codecs.BOM_UTF8 + b" \t\r\n"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell what UTF-8, and a tokenizer, cannot


class BadRecord(ValueError):
    """A record that cannot be read. Those that fail alike are counted together, by their `kind`; `rest` says
    where in the record, and what would be right."""

    def __init__(self, kind: str, rest: str) -> None:
        super().__init__(kind + rest)
        self.kind = kind


def check_path(path: Path) -> None:
    """Raises `UserError` if `path` is no file that can be opened, or a kind of file that is not read."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that can be read ({READ})") from None
    if not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        raise UserError(f"{path}: not a kind of file that is read ({READ}); convert it to .jsonl")


def check_characters(text: str, name: str) -> None:
    if _LONE_SURROGATE.search(text):
        raise BadRecord(f"{name} has half a surrogate pair", " (\\ud800 to \\udfff); give whole characters")


def read_records(path: Path) -> Iterator[tuple[int, dict | BadRecord]]:
    """Yield (number, record); lines are numbered from 1, the records of a list from 0.

    Of a .jsonl file one record is in memory at a time. A .json file is read whole; if it holds lines of JSON
    rather than a list, as many do, they are read as such. Raises `UserError` for a file that cannot be read:
    torn gzip data, or a list that is not JSON.
    """
    check_path(path)
    number = 0
    try:
        with path.open("rb") as raw:
            # The content decides, because browsers that unpack a download leave it its name.
            file = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            records = _records_of_lines(file)
            if path.name.removesuffix(".gz").endswith(".json"):
                content = file.read()
                file.seek(0)
                if content.lstrip(_BLANK).startswith(b"["):
                    values = _parse(content)
                    if isinstance(values, BadRecord):
                        raise UserError(f"{path}: {values}")
                    records = enumerate(map(_record, values))
            for number, record in records:
                yield number, record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error}); fetch the file again") from None


def _records_of_lines(file: BufferedIOBase) -> Iterator[tuple[int, dict | BadRecord]]:
    number = 0
    while line := file.readline(LONGEST_RECORD + 1):
        number += 1
        if len(line) > LONGEST_RECORD:
            while line and not line.endswith(b"\n"):  # Skip the rest without holding it.
                line = file.readline(LONGEST_RECORD)
            yield number, BadRecord(f"more than {LONGEST_RECORD} bytes", "; no preference is that long")
        elif line.strip(_BLANK):
            yield number, _record(_parse(line))


def _parse(text: bytes) -> Any:
    """The JSON value that `text` spells, or a `BadRecord`."""
    try:
        return json.loads(text.decode("utf-8-sig").rstrip())
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, 100,000 brackets
        reason = str(error).replace("line 1 ", "")  # A record of .jsonl is a single line for the decoder.
        hint = "give one object per line, or in a .json file a list of objects"
        return BadRecord("not JSON in UTF-8", f" ({reason}); {hint}")


def _record(value: Any) -> dict | BadRecord:
    if isinstance(value, dict | BadRecord):
        return value
    return BadRecord(f"a JSON {type(value).__name__}", "; a record is an object with chosen and rejected")
