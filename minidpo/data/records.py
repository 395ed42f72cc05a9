"""Files to records: .jsonl, .json and .csv, plain, .gz or .zst, and through tables.py .parquet and .arrow.

A file that cannot be read at all is a `UserError`. What is wrong with a single record is yielded as a
`BadRecord` in its place, so that the caller may skip it. Nothing here knows what a record should hold.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minidpo.data.bad_record import LONGEST_RECORD, BadRecord, printable, too_long
from minidpo.data.paths import TABLES, data_files, kind_of, one_of
from minidpo.data.tables import read_table
from minidpo.errors import UserError, one_line
from minidpo.files import require_no_pointer

_FORM = "a record is an object with chosen and rejected; a file that is one list of objects is named .json"
_CUT_OFF = "the file seems to be cut off here; fetch it again"
_LATIN_1 = "text in UTF-8 is read; convert the file if it is, say, Latin-1: iconv -f latin1 -t utf8"
_BLANK = codecs.BOM_UTF8 + b" \t\r\n"

_GZIP, _ZSTD = b"\x1f\x8b", (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18")  # pzstd begins with a skipped frame.
# A frame that is skipped. The library takes a torn file for one that ends, unless this follows: as the rest
# of a torn frame it is spoilt.
_ZSTD_END = b"\x50\x2a\x4d\x18" + (2**18).to_bytes(4, "little") + b"\xff" * 2**18

Records = Iterator[tuple[int, dict | BadRecord]]


def read_records(path: Path) -> Records:
    """Yield (number, record) of a file, or of the directory that holds a single one.

    Lines are numbered from 1, the records of a list or a table from 0, those of a .csv file by their first
    line. One record is in memory at a time, of a table a few hundred; only a .json file that does not hold
    lines of JSON is read whole. Raises `UserError` for a file that cannot be read.
    """
    files = data_files([path])
    if len(files) > 1:
        raise UserError(f"{path}: stands for {len(files)} files, and one is needed; name {one_of(files)}")
    path = Path(files[0])
    kind, number = kind_of(path), 0
    if kind in TABLES:
        yield from enumerate(read_table(path, kind))
        return
    try:
        if kind == ".json" and (values := _values_of_json(path)) is not None:
            yield from enumerate(map(_record, values))
            return
        with _opened(path) as file:
            for number, record in _records_of_csv(path, file) if kind == ".csv" else _records_of_lines(file):
                yield number, record
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: cannot be read ({error}); fetch the file again") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The bytes of a text file, unpacked if its content is compressed: browsers that unpack a download leave
    it its name. Raises `UserError` for what is no text in UTF-8; reading torn or spoilt compressed data
    raises OSError or EOFError."""
    zstd_error: Any = ()
    with path.open("rb") as raw:
        file: Any = raw
        if raw.peek(4)[:2] == _GZIP:
            file = gzip.open(raw)
        elif raw.peek(4)[:4] in _ZSTD:
            try:
                import zstandard
            except ImportError:
                raise UserError(f"{path}: compressed with zstd; pip install zstandard") from None
            zstd_error = zstandard.ZstdError
            end = io.BytesIO(_ZSTD_END)
            source: Any = SimpleNamespace(read=lambda size: raw.read(size) or end.read(size))
            unpacked = zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True)
            file = io.BufferedReader(unpacked)
        try:
            begin = file.peek(1024)[:1024]
            require_no_pointer(path, begin)
            if (encoding := json.detect_encoding(begin).removesuffix("-sig")) != "utf-8":
                right = f"convert it: iconv -f {encoding} -t utf-8 '{path}'"
                raise UserError(f"{path}: text in {encoding.upper()}, and UTF-8 is read; {right}")
            if begin.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
                raise UserError(f"{path}: a web page, not data; download the file that the page is about")
            yield file
        except zstd_error as error:
            raise OSError(one_line(error)) from None


def _values_of_json(path: Path) -> list | None:
    """What is in a .json file that is a list or one object over several lines; None for lines of objects."""
    with _opened(path) as file:
        first = next((line for line in _lines(file) if line.strip(_BLANK)), b"").strip(_BLANK)
    is_list = first.startswith(b"[")
    if not is_list and (first.endswith(b"}") or not first):
        return None
    # Text packs to a tenth at best. What unpacks to far more is made to fill memory, and never held whole.
    limit = LONGEST_RECORD + 100 * path.stat().st_size
    with _opened(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path}: unpacks to more than {limit} bytes; give one object per line, in .jsonl.gz")
    value = _parse(content, torn=not content.rstrip().endswith((b"]", b"}")))
    if is_list and isinstance(value, BadRecord):
        raise UserError(f"{path}: {value}")
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else None


def _lines(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The lines of a file; of one that is too long a beginning, which is too long as well."""
    while line := file.readline(LONGEST_RECORD + 1):
        yield line
        while len(line) > LONGEST_RECORD and not line.endswith(b"\n"):  # Skip the rest without holding it.
            line = file.readline(LONGEST_RECORD + 1)


def _records_of_lines(file: io.BufferedIOBase) -> Records:
    for number, line in enumerate(_lines(file), 1):
        if len(line) > LONGEST_RECORD:
            yield number, too_long()
        elif line.strip(_BLANK):
            yield number, _record(_parse(line, torn=not line.endswith((b"\n", b"}"))))


def _records_of_csv(path: Path, file: io.BufferedIOBase) -> Records:
    """The rows under a row of names, all values as text. A row with a misplaced quote is no `BadRecord`,
    because what belongs to it, and what to the next one, cannot be told."""
    # A quote that is never closed would make one value of all that follows.
    csv.field_size_limit(LONGEST_RECORD)
    rows, names, begin = csv.reader(map(_text, _lines(file)), strict=True), None, 1
    try:
        for row in rows:
            if row and names is None:
                if len(row) == 1 and (other := next((each for each in ";\t|" if each in row[0]), "")):
                    what = f"a single column, {printable(row[0])[:80]!r}"
                    raise UserError(f"{path}:{begin}: {what}; separate columns by commas, not by {other!r}")
                names = [name or f"column {place}" for place, name in enumerate(row, 1)]
                if len(set(names)) < len(names):
                    what = f"two columns have one name ({', '.join(names)})"
                    raise UserError(f"{path}:{begin}: {what}; rename one")
            elif names and len(row) == len(names):
                yield begin, dict(zip(names, row, strict=True))
            elif row and names:
                right = "; a value that holds commas stands in quotes"
                yield begin, BadRecord(f"{len(row)} values under {len(names)} names of columns", right)
            begin = rows.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        right = "values with commas, quotes or line breaks stand in quotes, and quotes are doubled"
        right = _LATIN_1 if isinstance(error, UnicodeDecodeError) else right
        raise UserError(f"{path}:{begin}: not CSV ({one_line(error)}); {right}") from None


def _text(line: bytes) -> str:
    if len(line) > LONGEST_RECORD:
        raise csv.Error(f"a line of more than {LONGEST_RECORD} bytes")
    return line.removeprefix(codecs.BOM_UTF8).decode()


def _parse(text: bytes, torn: bool) -> Any:
    """The JSON value that `text` spells, or a `BadRecord`. torn: whether its end seems to be missing."""
    try:
        return json.loads(text.decode("utf-8-sig").rstrip())
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, 100,000 brackets
        reason = str(error).replace("line 1 ", "")  # A record of .jsonl is a single line for the decoder.
        right = _LATIN_1 if isinstance(error, UnicodeDecodeError) else _FORM
        right = _CUT_OFF if torn and "Extra data" not in reason and "(char 0)" not in reason else right
        return BadRecord("not JSON in UTF-8", f" ({reason}); {right}")


def _record(value: Any) -> dict | BadRecord:
    if isinstance(value, dict | BadRecord):
        return value
    return BadRecord(f"a JSON {type(value).__name__}", f"; {_FORM}")
