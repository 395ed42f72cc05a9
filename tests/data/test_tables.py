"""Parquet and Arrow files hold the records that lines of JSON would."""

import datetime
import decimal
from pathlib import Path

import pytest

from minidpo.data import DataReport, bad_record, read_preferences, read_records, tables
from record_files import GOOD, SKIP_BAD, refusal

USER, ASSISTANT = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}


@pytest.fixture
def pa():
    module = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    return module


def write(pa, path: Path, records: object, rows: int = 1000) -> Path:
    """A table, or the records of one, as a file: .parquet, .arrow (for streams) or .ipc.arrow (the other).
    rows: of a row group or batch."""
    table = pa.Table.from_pylist(records) if isinstance(records, list) else records
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=rows)
        return path
    new = pa.ipc.new_file if path.name.endswith(".ipc.arrow") else pa.ipc.new_stream
    with new(path, table.schema) as out:
        out.write_table(table, max_chunksize=rows)
    return path


ALL = pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.ipc.arrow"])


@ALL
def test_messages(pa, tmp_path, name):
    """Nested messages come back as they were, without the null keys that Arrow adds at every depth."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Bern", "tags": ["a", "b"]}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"x": 1}}}
    records = [
        {"prompt": [USER | {"name": "Ann"}], "chosen": [ASSISTANT], "rejected": [], "margin": 0.5},
        {"prompt": [USER], "chosen": [ASSISTANT | {"tool_calls": [call, other]}], "rejected": [ASSISTANT]},
    ]
    assert [*read_records(write(pa, tmp_path / name, records))] == [*enumerate(records)]


@ALL
def test_groups(pa, tmp_path, name):
    """Records are numbered on from 0 over row groups and batches, empty ones too."""
    records = [GOOD | {"prompt": f"{i}"} for i in range(1000)]
    for rows in (7, 300, 5000):
        path = write(pa, tmp_path / name, records, rows)
        assert [*read_records(path)] == [*enumerate(records)]
    empty = write(pa, tmp_path / name, pa.Table.from_pylist(records)[:0])
    assert "no usable pair in 0 records (the file is empty)" in refusal(empty)


def test_values(pa, tmp_path):
    """Values that JSON does not have become text, which is read as a number where one is needed."""
    columns = {
        "bytes": pa.array(["ü".encode()]),
        "time": pa.array([datetime.datetime(2026, 11, 26, 9, 30)]),
        "decimal": pa.array([decimal.Decimal("1.5")]),
        "map": pa.array([[("a", 1), ("b", None)]], pa.map_(pa.string(), pa.int64())),
        "structs": pa.array([[{"a": 1, "b": None}, None]]),
        "null": pa.nulls(1),
    }
    ((_, record),) = read_records(write(pa, tmp_path / "a.parquet", pa.table(columns)))
    expected = {"bytes": "ü", "time": "2026-11-26T09:30:00", "decimal": "1.5", "map": {"a": 1}}
    assert record == expected | {"structs": [{"a": 1}, None]}


@ALL
def test_bad_record(pa, tmp_path, name, monkeypatch):
    """A record with bytes that are no text, or that is far too long, is named and can be skipped."""
    records = [GOOD | {"image": b"text"} for _ in range(5)]
    records[3] |= {"image": b"\x89PNG"}
    path, report = write(pa, tmp_path / name, records), DataReport()
    assert refusal(path).startswith(": record 3: column 'image' is no text ('utf-8' codec can't decode byte")
    assert len([*read_preferences(path, report, data=SKIP_BAD)]) == 4
    assert report.files[0].dropped == {"column 'image' is no text": [3]}
    monkeypatch.setattr(tables, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(bad_record, "LONGEST_RECORD", 1000)
    records[3] |= {"image": b"c" * 1001}
    assert refusal(write(pa, tmp_path / name, records)).startswith(": record 3: more than 1000 bytes; no pre")


@ALL
def test_broken(pa, tmp_path, name):
    """A torn file, and one that is something else, is refused in one line."""
    path = write(pa, tmp_path / name, [GOOD | {"prompt": str(i**9)} for i in range(3000)])
    whole = path.read_bytes()
    for content in (b"", b"{}\n", b"ARROW1", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert refusal(path).startswith(": cannot be read as .")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refusal(path).startswith(": a git-lfs pointer, not the file; run git lfs pull in ")


def test_hostile_offsets(pa, tmp_path):
    """An Arrow file whose offsets point outside of it is refused; pyarrow alone would crash."""
    path = write(pa, tmp_path / "a.arrow", [GOOD | {"prompt": "abc"}, GOOD])
    content = path.read_bytes()
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 3, 4))  # "abc", then "p"
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:4] + b"\xff\xff\xff\x7f" + offsets[8:]))
    assert refusal(path).startswith(": cannot be read as .arrow (")


def test_two_columns(pa, tmp_path):
    """Two columns of one name, of which a record could hold one alone, are refused."""
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["chosen", "chosen"])
    for name in ("a.parquet", "a.arrow"):
        assert refusal(write(pa, tmp_path / name, table)).startswith(": two columns have one name (chosen, c")


@pytest.mark.parametrize(
    ("name", "rows"), [("a.parquet", 1000), ("a.parquet", 200_000), ("a.arrow", 1000), ("a.ipc.arrow", 1000)]
)
def test_memory(pa, tmp_path, name, rows):
    """Of a file one batch is in memory at a time, of parquet also where all records are in one row group."""
    table = pa.table({"prompt": [f"{i * 7919**20}" for i in range(200_000)]})
    path = write(pa, tmp_path / name, table, rows)
    size, before, held = table.nbytes, pa.total_allocated_bytes(), []
    for number, _ in read_records(path):
        if number % 1000 == 0:
            held.append(pa.total_allocated_bytes() - before)
    assert max(held) < size / 4 and size > 16e6
