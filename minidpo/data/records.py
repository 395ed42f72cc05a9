"""Files to records: .jsonl, .json and .csv, plain, .gz or .zst, and through tables.py .parquet and .arrow.

A file that cannot be read at all is a `UserError`. What is wrong with a single record is yielded as a
`BadRecord` in its place, so that the caller may skip it. Nothing here knows what a record should hold.
"""

import codecs
import csv
import json
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from minidpo.data.bad_record import LONGEST_RECORD, BadRecord, check_characters, printable, too_long
from minidpo.data.opened import open_text
from minidpo.data.paths import TABLES, data_file, kind_of
from minidpo.data.tables import read_table
from minidpo.errors import UserError
from minidpo.log import print0

# What reading records and reading a record share is in bad_record.py, and imported from here.
__all__ = ["BadRecord", "check_characters", "printable", "read_records"]

_FORM = (
    "a record is an object with chosen and rejected, and a file that is one list of objects is named .json"
)
_BLANK = codecs.BOM_UTF8 + b" \t\r\n"

# A file of one object with one key is a record if the key is one of these, and else a list under that key.
_OF_A_RECORD = {"messages", "conversations"}

Records = Iterator[tuple[int, dict | BadRecord]]


def read_records(path: Path) -> Records:
    """Yield (number, record) of a file, or of the directory that holds a single one.

    Lines are numbered from 1, the records of a list or a table from 0, those of a .csv file by the line on
    which they begin. One record is in memory at a time, of a table a few hundred. Only a .json file is read
    whole, unless it holds lines of JSON, as many do. Raises `UserError` for a file that cannot be read.
    """
    path = data_file(path)
    kind, number = kind_of(path), 0
    if kind in TABLES:
        yield from read_table(path, kind)
        return
    try:
        values = _values_of_json(path) if kind == ".json" else None
        if values is not None:
            yield from enumerate(map(_record, values))
            return
        with open_text(path) as file:
            records = _records_of_csv(path, file) if kind == ".csv" else _records_of_lines(file)
            for number, record in records:
                yield number, record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error}); fetch the file again") from None


def _values_of_json(path: Path) -> list | None:
    """What is in a .json file that is a list, one object, or an object around a list; None for lines."""
    with open_text(path) as file:
        first = next((line for line in _lines(file) if line.strip(_BLANK)), b"")
    is_list = first.strip(_BLANK).startswith(b"[")
    whole_line = first.strip(_BLANK).endswith(b"}") or not first
    if not is_list and whole_line and _key_of_list(_parse(first)) is None:
        return None
    # Text packs to a tenth at best. What unpacks to far more is made to fill memory, and never held whole.
    limit = LONGEST_RECORD + 100 * path.stat().st_size
    with open_text(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path}: unpacks to more than {limit} bytes; give one object per line, in .jsonl.gz")
    value = _parse(content)
    if is_list and isinstance(value, BadRecord):
        raise UserError(f"{path}: {value}")
    if (key := _key_of_list(value)) is not None:
        print0(f"{path}: its records are the list under {key!r}")
        return value[key]
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else None


def _key_of_list(value: Any) -> str | None:
    """The key of an object that holds nothing but a list of records; None for anything else."""
    if isinstance(value, dict) and len(value) == 1:
        ((key, inner),) = value.items()
        if key not in _OF_A_RECORD and isinstance(inner, list) and isinstance(next(iter(inner), None), dict):
            return key
    return None


def _lines(file: BufferedIOBase) -> Iterator[bytes]:
    """The lines of a file; of one that is too long a beginning, which is too long as well."""
    while line := file.readline(LONGEST_RECORD + 1):
        yield line
        while len(line) > LONGEST_RECORD and not line.endswith(b"\n"):  # Skip the rest without holding it.
            line = file.readline(LONGEST_RECORD + 1)


def _records_of_lines(file: BufferedIOBase) -> Records:
    for number, line in enumerate(_lines(file), 1):
        if len(line) > LONGEST_RECORD:
            yield number, too_long()
        elif line.strip(_BLANK):
            yield number, _record(_parse(line))


def _records_of_csv(path: Path, file: BufferedIOBase) -> Records:
    """The rows under a row of names, all values as text. A row with a misplaced quote is no `BadRecord`,
    because what belongs to it, and what to the next one, cannot be told."""
    begin = size = 0  # of a row: its first line, and its bytes so far

    def text() -> Iterator[str]:
        nonlocal size
        for line in _lines(file):
            size += len(line)
            if size > LONGEST_RECORD:
                what = f"a row of more than {LONGEST_RECORD} bytes"
                raise UserError(f"{path}:{begin}: {what}; is there a quote that is never closed?")
            yield line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")

    csv.field_size_limit(LONGEST_RECORD)
    rows, names = csv.reader(text(), strict=True), None
    while True:
        begin, size = rows.line_num + 1, 0
        try:
            row = next(rows, None)
        except csv.Error as error:
            right = (
                "a value with commas, quotes or line breaks stands in quotes, and a quote in it is doubled"
            )
            raise UserError(f"{path}:{begin}: not CSV ({error}); {right}") from None
        if row is None:
            return
        if row and names is None:
            names = [name or f"column {place}" for place, name in enumerate(row, 1)]
            if len(set(names)) < len(names):
                raise UserError(f"{path}:{begin}: two columns have one name ({', '.join(names)}); rename one")
        elif row and names:
            yield begin, _record_of_row(names, row)


def _record_of_row(names: list[str], row: list[str]) -> dict | BadRecord:
    if len(row) != len(names):
        right = "; a value that holds commas stands in quotes"
        return BadRecord(f"{len(row)} values under {len(names)} names of columns", right)
    for name, value in zip(names, row, strict=True):
        if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
            return BadRecord(f"column {name!r} is not UTF-8", "; convert the file: iconv -f CODING -t utf-8")
    return dict(zip(names, row, strict=True))


def _parse(text: bytes) -> Any:
    """The JSON value that `text` spells, or a `BadRecord`."""
    try:
        return json.loads(text.decode("utf-8-sig").rstrip())
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, 100,000 brackets
        reason = str(error).replace("line 1 ", "")  # A record of .jsonl is a single line for the decoder.
        return BadRecord("not JSON in UTF-8", f" ({reason}); {_FORM}")


def _record(value: Any) -> dict | BadRecord:
    if isinstance(value, dict | BadRecord):
        return value
    return BadRecord(f"a JSON {type(value).__name__}", f"; {_FORM}")
