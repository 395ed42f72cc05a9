"""Parquet and Arrow files to records as JSON would have them, through pyarrow (the extra `parquet`).

Arrow has no record without a key: where one record has `tools`, or one message `name`, all others have it as
null. So a null key means no key here, at every depth: that of a record, of a message, of a tool's arguments.
"""

from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from minidpo.data.bad_record import LONGEST_RECORD, BadRecord, too_long
from minidpo.errors import UserError, one_line
from minidpo.files import require_no_pointer

_ROWS = 256  # converted at once: fast, and little in memory however long the records are
_BUFFER = 2**20  # bytes read ahead in each column


def read_table(path: Path, kind: str) -> Iterator[tuple[int, dict | BadRecord]]:
    """Yield (number, record), numbered from 0. Raises `UserError` for a file that cannot be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: {kind} needs the extra `parquet`: pip install -e '.[parquet]'") from None
    with path.open("rb") as file:
        begin = file.read(100)
    require_no_pointer(path, begin)
    number = 0
    try:
        batches = _of_parquet(path) if kind == ".parquet" else _of_arrow(path, begin.startswith(b"ARROW1"))
        for batch in batches:
            for record in _records(batch):
                yield number, record
                number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        what = f"{path}: cannot be read as {kind} after {number} records ({one_line(error)})"
        raise UserError(f"{what}; fetch the file again") from None


def _of_parquet(path: Path) -> Iterator[Any]:
    """Batches of a row group after the other. Ahead of them no more than the buffers is read."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
        _check_names(path, file.schema_arrow.names)
        yield from file.iter_batches(_ROWS, use_threads=False)


def _of_arrow(path: Path, random_access: bool) -> Iterator[Any]:
    """Batches of either of Arrow's two formats: the one for streams, which `datasets` writes, and the one for
    random access. They are checked, because pyarrow trusts the offsets in these files and would crash."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as source:  # A memory map would keep all of the file in this process.
        reader: Any = pyarrow.ipc.open_file(source) if random_access else pyarrow.ipc.open_stream(source)
        _check_names(path, reader.schema.names)
        whole = map(reader.get_batch, range(reader.num_record_batches)) if random_access else reader
        for batch in whole:
            batch.validate(full=True)
            for start in range(0, len(batch), _ROWS):
                yield batch.slice(start, _ROWS)


def _check_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: two columns are called {twice!r}; rename one")


def _records(batch: Any) -> list[dict | BadRecord]:
    """The records of a batch; row by row if they are long, or if one of them cannot be read."""
    if batch.nbytes <= LONGEST_RECORD:
        try:
            return _values(batch.to_struct_array())
        except ValueError:
            pass
    return [_record(batch.slice(row, 1)) for row in range(len(batch))]


def _record(row: Any) -> dict | BadRecord:
    """The record of a batch of one row."""
    if row.nbytes > LONGEST_RECORD:
        return too_long()
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            _values(column)
        except ValueError as error:
            right = f" ({one_line(error)}); text in UTF-8 is read, and no images or other bytes"
            return BadRecord(f"column {name!r} is no text", right)
    return _values(row.to_struct_array())[0]


def _values(array: Any) -> list:
    """The values of an array. Those of structs and lists are converted column by column, because many
    versions of pyarrow take five times as long for messages. Raises ValueError for bytes that are no text."""
    from pyarrow import compute, types

    kind = array.type
    if types.is_struct(kind):
        names, of_fields = [field.name for field in kind], map(_values, array.flatten())
        rows = zip(*of_fields, strict=True) if names else [()] * len(array)
        valid = array.is_valid().to_pylist()
        return [
            {name: value for name, value in zip(names, row, strict=True) if value is not None}
            if there
            else None
            for row, there in zip(rows, valid, strict=True)
        ]
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner, lengths = iter(_values(array.flatten())), compute.list_value_length(array).to_pylist()
        return [None if length is None else list(islice(inner, length)) for length in lengths]
    return [_plain(value) for value in array.to_pylist()]


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
    if isinstance(value, date | time):
        return value.isoformat()
    return float(value) if isinstance(value, Decimal) else str(value)
