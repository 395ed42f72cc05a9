"""Parquet and Arrow files to records as JSON would have them, through pyarrow (the extra `parquet`).

Arrow has no record without a key: where one record has `tools`, or one message `name`, all others have it as
null. So a null key means no key here, at every depth: that of a record, of a message, of a tool's arguments.
"""

from collections.abc import Iterator
from datetime import date, time
from pathlib import Path
from typing import Any

from minidpo.data.bad_record import LONGEST_RECORD, BadRecord, too_long
from minidpo.errors import UserError, one_line
from minidpo.files import require_no_pointer

_ROWS = 256  # converted at once: fast, and little in memory however long the records are
_BUFFER = 2**20  # bytes read ahead in each column, and no more: not a row group


def read_table(path: Path, kind: str) -> Iterator[dict | BadRecord]:
    """Yield the records. Raises `UserError` for a file that cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: {kind} needs the extra `parquet`: pip install -e '.[parquet]'") from None
    with path.open("rb") as file:
        begin = file.read(100)
    require_no_pointer(path, begin)
    try:
        if kind == ".parquet":
            table = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)
            batches = table.iter_batches(_ROWS, use_threads=False)
        else:
            batches = _of_arrow(pyarrow, path, begin.startswith(b"ARROW1"))
        for batch in batches:
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise UserError(f"{path}: two columns have one name ({', '.join(names)}); rename one")
            # Where records are long, one at a time is converted.
            is_long = batch.nbytes > LONGEST_RECORD
            for some in [batch.slice(row, 1) for row in range(len(batch))] if is_long else [batch]:
                yield from [too_long()] if some.nbytes > LONGEST_RECORD else map(_record, some.to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as {kind} ({one_line(error)})"
        raise UserError(f"{path}: {what}; fetch the file again") from None


def _of_arrow(pyarrow: Any, path: Path, random_access: bool) -> Iterator[Any]:
    """Batches of either of Arrow's two formats: the one for streams, which `datasets` writes, and the one for
    random access. They are checked, because pyarrow trusts the offsets in these files and would crash."""
    with pyarrow.OSFile(str(path)) as source:  # A memory map would keep all of the file in this process.
        reader = pyarrow.ipc.open_file(source) if random_access else pyarrow.ipc.open_stream(source)
        whole = map(reader.get_batch, range(reader.num_record_batches)) if random_access else reader
        for batch in whole:
            batch.validate(full=True)
            for start in range(0, len(batch), _ROWS):
                yield batch.slice(start, _ROWS)


def _record(values: dict) -> dict | BadRecord:
    record, name = {}, ""
    try:
        for name, value in values.items():
            if value is not None:
                record[name] = _plain(value)
    except UnicodeDecodeError as error:
        right = f" ({one_line(error)}); text in UTF-8 is read, and no images or other bytes"
        return BadRecord(f"column {name!r} is no text", right)
    return record


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        value = dict(value)  # The entries of a map.
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):  # Some programs write text so.
        return value.decode()
    # Of decimals too: text is read as a number where one is needed.
    return value.isoformat() if isinstance(value, date | time) else str(value)
