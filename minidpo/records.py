"""Files to records: .jsonl (one JSON object a line) and .json (a list of objects), plain or gzipped.

Nothing here knows what a record should hold. A file that cannot be read at all is a `UserError`; what one line
does wrong is handed on as a `BadRecord` in its place, so that the caller may skip it.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from minidpo.errors import UserError
from minidpo.formats import BadRecord

READ = ".jsonl or .json, plain or .gz"

# A preference of a million tokens is about 4 MB. Far more than that is a broken file, or a small gzip file made
# to fill the memory of whoever opens it.
LONGEST_RECORD = 16 * 2**20

_GZIP_MAGIC = b"\x1f\x8b"
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
_CONVERT = {  # without these arguments pandas reads the text "NA" as missing, "12" as a number
    ".parquet": "read_parquet({source!r})",
    ".csv": "read_csv({source!r}, keep_default_na=False, dtype=str)",
}


def check_path(path: Path) -> None:
    """Raises `UserError` for what is no file, and for a kind of file that is not read."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file in it ({READ})")
    if path.suffix in _CONVERT:
        read, target = _CONVERT[path.suffix].format(source=str(path)), str(path.with_suffix(".jsonl"))
        command = f"import pandas; pandas.{read}.to_json({target!r}, orient='records', lines=True)"
        raise UserError(f'{path}: {path.suffix} is not read; convert it: python -c "{command}"')
    if not path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
        raise UserError(f"{path}: an unknown kind of file; {READ} is read")
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that can be read ({READ})") from None


def read_records(path: Path) -> Iterator[tuple[int, dict | BadRecord]]:
    """Yield (line number from 1, record); of a .jsonl file one record in memory at a time.

    A .json file is read whole; should it hold lines of JSON rather than a list, as many do, they are read as such.
    Raises `UserError` for a file that cannot be read: torn gzip data, or a list with broken JSON in it, where no
    next record can be found.
    """
    check_path(path)
    number = 0
    try:
        with path.open("rb") as raw:
            # By content: downloads that a browser unpacked keep their .gz, and the reverse.
            file = gzip.open(raw) if raw.peek(2)[:2] == _GZIP_MAGIC else raw
            if path.name.removesuffix(".gz").endswith(".json"):
                text = file.read().removeprefix(codecs.BOM_UTF8)
                if text.lstrip()[:1] == b"[":
                    yield from _list(path, text)
                    return
                file.seek(0)
            for number, line in _lines(file):
                yield number, line if isinstance(line, BadRecord) else _record(line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: torn gzip data ({error}); fetch the file again") from None
    except OSError as error:
        raise UserError(f"{path}:{number + 1}: {error.strerror}; fetch the file again") from None


def _lines(file: BufferedIOBase) -> Iterator[tuple[int, bytes | BadRecord]]:
    """The lines that are not blank, numbered as an editor does. Of a line too long only a part is ever held."""
    number = 0
    while line := file.readline(LONGEST_RECORD + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > LONGEST_RECORD:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST_RECORD)
            yield number, _too_long()
        elif line.strip():
            yield number, line


def _record(line: bytes) -> dict | BadRecord:
    try:
        record = json.loads(line.decode("utf-8").rstrip())
    except json.JSONDecodeError as error:
        return BadRecord("broken JSON", f" at column {error.colno} ({error.msg}); give one object a line")
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, 100,000 brackets
        return BadRecord("not JSON in UTF-8", f" ({error}); give one object a line")
    return _object(record)


def _list(path: Path, content: bytes) -> Iterator[tuple[int, dict | BadRecord]]:
    """The elements of a JSON list with the lines they begin on, one object in memory at a time."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{number}: not JSON in UTF-8 ({error}); fetch the file again") from None
    decoder, counted, number = json.JSONDecoder(), 0, 1
    at = _skip(text, text.index("[") + 1)
    if text[at : at + 1] == "]":
        return
    try:
        while True:
            number, counted = number + text.count("\n", counted, at), at
            record, end = decoder.raw_decode(text, at)
            yield number, _too_long() if end - at > LONGEST_RECORD else _object(record)
            at = _skip(text, end)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _skip(text, at + 1)
        if _skip(text, at + 1) != len(text):
            raise json.JSONDecodeError("Extra data", text, _skip(text, at + 1))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}); give a list of objects"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}:{number}: not JSON that can be read ({error}); give a list of objects"
        ) from None


def _skip(text: str, at: int) -> int:
    found = _NOT_BLANK.search(text, at)
    return found.start() if found else len(text)


def _object(record: object) -> dict | BadRecord:
    if isinstance(record, dict):
        return record
    return BadRecord(f"a JSON {type(record).__name__}", "; a record is an object with chosen and rejected")


def _too_long() -> BadRecord:
    return BadRecord(
        f"a record of more than {LONGEST_RECORD // 2**20} MiB", "; no preference is that long: mend the file"
    )
