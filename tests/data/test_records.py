"""One data set in every kind of text file: the records are the same, and are numbered for messages."""

import csv
import gzip
import io
import json
import sys
import tracemalloc

import pytest

from minidpo.data import DataReport, read_preferences, read_records
from minidpo.data import records as module
from minidpo.errors import UserError
from record_files import GOOD, SKIP_BAD, refusal

TWO = [GOOD, GOOD | {"prompt": 'He said "ü",\n\nthen left'}]
LINES = "\n".join(map(json.dumps, TWO)) + "\n"


def csv_text(*records: dict) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, records[0])
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)


def pzstd(content: bytes) -> bytes:
    """As programs that compress in parallel: several frames, the first of them to be skipped."""
    return b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstd(content[:9]) + zstd(content[9:])


@pytest.mark.parametrize(
    ("ending", "pack"),
    [("", bytes), (".gz", gzip.compress), (".zst", pzstd), (".gz", bytes), ("", gzip.compress), ("", zstd)],
)
@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("A.JSONL", LINES, [1, 2]),
        ("a.json", LINES, [1, 2]),
        ("a.json", json.dumps(TWO), [0, 1]),
        ("a.json", "\n" + json.dumps(TWO, indent=2), [0, 1]),
        ("a.json", json.dumps(GOOD, indent=2), [0]),
        ("a.csv", csv_text(*TWO), [2, 3]),  # Line 1 has the names.
        ("a.Csv", "\ufeff" + csv_text(*TWO).replace("\r\n", "\n"), [2, 3]),
    ],
)
def test_kinds(tmp_path, name, content, numbers, ending, pack):
    """Lines, a list and a table with names hold the same records, also compressed; one object is one.
    Whether a file is compressed is read from its content: a browser that unpacks leaves the name."""
    path = tmp_path / (name + ending)
    path.write_bytes(pack(content.encode()))
    assert [*read_records(path)] == [*zip(numbers, TWO, strict=False)]


def test_csv_margin(tmp_path):
    """Numbers of a .csv file are text that is read where a number is needed; an empty value is none. A text
    may be as long as a record; Python's csv module stops at 131,072 characters."""
    rows = [GOOD | {"margin": margin, "prompt": "7" * 200_000} for margin in ("1.5", "", "-2e1")]
    (tmp_path / "a.csv").write_text(csv_text(*rows))
    pairs = [*read_preferences(tmp_path / "a.csv")]
    assert [(pair.margin, len(pair.prompt)) for pair in pairs] == [(m, 200_000) for m in (1.5, None, -20.0)]


@pytest.mark.parametrize("row", ["p,c", "p,c,r,x"])
def test_bad_row(tmp_path, row):
    """A row that cannot be read is named by the line on which it begins, and can be skipped."""
    (tmp_path / "a.csv").write_text(f'prompt,chosen,rejected\n"two\nlines",c,r\n{row}\n\nq,c,r\n')
    report = DataReport()
    said = f":4: {len(row.split(','))} values under 3 names of columns; a value that holds commas stands in q"
    assert refusal(tmp_path / "a.csv").startswith(said)
    pairs = [*read_preferences(tmp_path / "a.csv", report, data=SKIP_BAD)]
    assert [pair.prompt for pair in pairs] == ["two\nlines", "q"]
    assert [*report.files[0].dropped.values()] == [[4]] and report.files[0].unit == "line"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a,b\n1,"2', ":2: not CSV (unexpected end of data); values with commas"),
        ('a,b\n1,"2" 3\n', ":2: not CSV (',' expected after '\"'); values with commas"),
        ("a,b\n1,\udce4\n", ":2: not CSV ('utf-8' codec can't decode byte 0xe4"),
        ("a,b,a\n1,2,3\n", ":1: two columns have one name (a, b, a); rename one"),
        ("prompt;chosen\n1;2\n", ":1: a single column, 'prompt;chosen'; separate columns by commas, not"),
        ("a,,b\n1,2,3\n", ":2: no key 'chosen'; its keys are a, column 2, b"),
        ('a,b\n1,"' + "2\n" * 600, ":2: not CSV (field larger than field limit (1000))"),
        ("a,b\n1," + "2" * 1001, ":2: not CSV (a line of more than 1000 bytes)"),
    ],
)
def test_broken_csv(tmp_path, monkeypatch, text, said):
    """A table whose rows or columns are unclear is refused as a whole, and never held in memory."""
    monkeypatch.setattr(module, "LONGEST_RECORD", 1000)
    (tmp_path / "a.csv").write_text(text, errors="surrogateescape")
    assert refusal(tmp_path / "a.csv").startswith(said)


# zstd


def test_torn_zstd(tmp_path):
    """A torn or spoilt zstd file is refused, also where it is torn at the end of a line."""
    many = [json.dumps(GOOD | {"prompt": str(i**9)}).encode() + b"\n" for i in range(5000)]
    whole, path = zstd(b"".join(many)), tmp_path / "a.jsonl.zst"
    torn = [whole[: len(whole) * 2 // 3], whole[:-5], zstd(many[0])[:-4], zstd(many[0]) + whole[:9]]
    for content in (*torn, whole[:99] + b"\xff" * 9 + whole[108:], whole[:-1] + b"\0", whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read \(.*; fetch the file again"):
            [*read_records(path)]


def test_zstd_bomb(tmp_path):
    """A small zstd file that unpacks to gigabytes is refused after a line's limit, not held in memory."""
    pytest.importorskip("zstandard")
    block = (2**17 << 3 | 0b010).to_bytes(3, "little") + b"c"  # 128 KiB of "c", and not the last block
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + block * 40_000)  # 160 kB for 5 GB
    tracemalloc.start()
    number, bad = next(read_records(path))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 1 and str(bad).startswith("more than 16777216 bytes") and held < 8 * 2**24


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        ("zstandard", "a.jsonl.zst", "compressed with zstd; pip install zstandard"),
        ("pyarrow", "a.parquet", ".parquet needs the extra `parquet`: pip install -e '.[parquet]'"),
    ],
)
def test_without(tmp_path, monkeypatch, module, name, said):
    """Without the module that a file needs, the message names what to install."""
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd")
    assert refusal(tmp_path / name) == f": {said}"
