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
from minidpo.files import require_no_pointer

READ = ".jsonl or .json, plain or .gz"

# A preference of a million tokens is about 4 MB. Far beyond that is a broken file, or a small gzip file made
# to fill the memory of whoever opens it.
LONGEST_RECORD = 16 * 2**20

_FORM = (
    "a record is an object with chosen and rejected, and a file that is one list of objects is named .json"
)
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
    known = path.name.removesuffix(".gz").endswith((".jsonl", ".json"))
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: not a regular file; name one ({READ}), and no pipe or device")
        path.open("rb").close()
    except OSError as error:
        comma = "" if known else "; on the command line a comma separates two files"
        convert = _convert(path) if path.is_dir() else ""
        right = convert or f"name a file that can be read ({READ}){comma}"
        raise UserError(f"{path}: {error.strerror}; {right}") from None
    if not known:
        right = _convert(path) or "convert it to .jsonl"
        raise UserError(f"{path}: not a kind of file that is read ({READ}); {right}")


def _convert(path: Path) -> str:
    """How to make a .jsonl file of a table that the package `datasets` wrote; empty for anything else."""
    stream = "pyarrow.ipc.open_stream({}).read_pandas()"
    out = path.with_suffix("")
    if parts := [*path.glob("*.arrow"), *path.glob("*/*.arrow")]:
        out = max(parts).parent  # Of several splits that a directory holds, the last is train.
        each = stream.format("f") + f" for f in sorted(glob.glob('{out}/*.arrow'))"
        modules, table = "glob, pandas, pyarrow", f"pandas.concat({each})"
    elif path.suffix == ".parquet":
        modules, table = "pandas", f"pandas.read_parquet('{path}')"
    elif path.suffix == ".arrow" and path.is_file():
        with path.open("rb") as file:  # Of arrow's two formats, `datasets` writes the one for streams.
            is_stream = file.read(6) != b"ARROW1"
        modules, table = "pandas", f"pandas.read_feather('{path}')"
        if is_stream:
            modules, table = "pyarrow", stream.format(f"'{path}'")
    else:
        return ""
    to_json = f"to_json('{out}.jsonl', orient='records', lines=True)"
    return f'convert it to .jsonl: python -c "import {modules}; {table}.{to_json}"'


def printable(text: str) -> str:
    """`text` on one line, for messages."""
    return text if text.isprintable() else ascii(text)


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
            begin = file.peek(1024)[:1024]
            require_no_pointer(path, begin)
            if (encoding := json.detect_encoding(begin).removesuffix("-sig")) != "utf-8":
                right = f"convert it: iconv -f {encoding} -t utf-8 '{path}'"
                raise UserError(f"{path}: text in {encoding.upper()}, and UTF-8 is read; {right}")
            records = _records_of_lines(file)
            if path.name.removesuffix(".gz").endswith(".json") and begin.lstrip(_BLANK).startswith(b"["):
                records = enumerate(map(_record, _values_of_list(path, file)))
            for number, record in records:
                yield number, record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error}); fetch the file again") from None


def _values_of_list(path: Path, file: BufferedIOBase) -> list:
    # Text packs to a tenth at best. What unpacks to far more is made to fill memory, and never held whole.
    limit = LONGEST_RECORD + 100 * path.stat().st_size
    content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path}: unpacks to more than {limit} bytes; give one object per line, in .jsonl.gz")
    values = _parse(content)
    if isinstance(values, BadRecord):
        raise UserError(f"{path}: {values}")
    return values


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
        return BadRecord("not JSON in UTF-8", f" ({reason}); {_FORM}")


def _record(value: Any) -> dict | BadRecord:
    if isinstance(value, dict | BadRecord):
        return value
    return BadRecord(f"a JSON {type(value).__name__}", f"; {_FORM}")
