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
from record_files import GOOD, refusal

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


PACKED = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("a.jsonl", LINES, [1, 2]),
        ("A.JSONL", LINES, [1, 2]),
        ("a.json", LINES, [1, 2]),
        ("a.json", json.dumps(TWO), [0, 1]),
        ("a.json", "\n" + json.dumps(TWO, indent=2), [0, 1]),
        ("a.csv", csv_text(*TWO), [2, 3]),  # Line 1 has the names.
        ("a.Csv", "\ufeff" + csv_text(*TWO).replace("\r\n", "\n"), [2, 3]),
    ],
)
def test_kinds(tmp_path, name, content, numbers, ending):
    """Lines, a list and a table with names hold the same records, also compressed."""
    path = tmp_path / (name + ending)
    path.write_bytes(PACKED[ending](content.encode()))
    assert [*read_records(path)] == [*zip(numbers, TWO, strict=True)]


def test_one_object(tmp_path):
    """One object over several lines is one record."""
    (tmp_path / "a.json").write_text(json.dumps(GOOD, indent=2))
    assert [*read_records(tmp_path / "a.json")] == [(0, GOOD)]


def test_content_decides(tmp_path):
    """Whether a file is compressed is read from its content: a browser that unpacks leaves the name."""
    for name, pack in (("a.jsonl.gz", bytes), ("b.jsonl", gzip.compress), ("c.jsonl", zstd)):
        (tmp_path / name).write_bytes(pack(LINES.encode()))
        assert [record for _, record in read_records(tmp_path / name)] == TWO


def test_csv_margin(tmp_path):
    """Numbers of a .csv file are text that is read where a number is needed; an empty value is none."""
    rows = [GOOD | {"margin": margin, "prompt": "7"} for margin in ("1.5", "", "-2e1")]
    (tmp_path / "a.csv").write_text(csv_text(*rows))
    pairs = [*read_preferences(tmp_path / "a.csv")]
    assert [(pair.margin, pair.prompt) for pair in pairs] == [(1.5, "7"), (None, "7"), (-20.0, "7")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("p,c", ":4: 2 values under 3 names of columns; a value that holds commas stands in quotes"),
        ("p,c,r,x", ":4: 4 values under 3 names"),
    ],
)
def test_bad_row(tmp_path, row, said):
    """A row that cannot be read is named by the line on which it begins, and can be skipped."""
    (tmp_path / "a.csv").write_text(f'prompt,chosen,rejected\n"two\nlines",c,r\n{row}\n\nq,c,r\n')
    report = DataReport()
    assert refusal(tmp_path / "a.csv").startswith(said)
    pairs = [*read_preferences(tmp_path / "a.csv", report, skip_bad=True)]
    assert [pair.prompt for pair in pairs] == ["two\nlines", "q"]
    assert [*report.files[0].dropped.values()] == [[4]] and report.files[0].unit == "line"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a,b\n1,"2', ":2: not CSV (unexpected end of data); values with commas"),
        ('a,b\n1,"2" 3\n', ":2: not CSV (',' expected after '\"'); values with commas"),
        ("a,b\n1,\udce4\n", ":2: not CSV ('utf-8' codec can't decode byte 0xe4"),
        ("a,b,a\n1,2,3\n", ":1: two columns have one name (a, b, a); rename one"),
        (
            "prompt;chosen\n1;2\n",
            ":1: a single column, 'prompt;chosen'; separate columns by commas, not by ';'",
        ),
        ("a,,b\n1,2,3\n", ":2: no key 'chosen'; its keys are a, column 2, b"),
        ('a,b\n1,"' + "2\n" * 600, ":2: not CSV (field larger than field limit (1000))"),
        ("a,b\n1," + "2" * 1001, ":2: not CSV (a line of more than 1000 bytes)"),
    ],
)
def test_broken_csv(tmp_path, monkeypatch, text, said):
    """A table of which it cannot be told where a row ends is refused as a whole, and never held."""
    monkeypatch.setattr(module, "LONGEST_RECORD", 1000)
    (tmp_path / "a.csv").write_text(text, errors="surrogateescape")
    assert refusal(tmp_path / "a.csv").startswith(said)


def test_long_value(tmp_path):
    """Python's csv module stops at values of 131,072 characters; here a value may be as long as a record."""
    (tmp_path / "a.csv").write_text(csv_text(GOOD | {"chosen": "c" * 200_000}))
    assert len(next(read_preferences(tmp_path / "a.csv")).chosen) == 200_000


# zstd


def test_zstd_frames(tmp_path):
    """A file of many frames, each smaller or larger than a read, is read whole."""
    many = [GOOD | {"prompt": str(i) * (i % 7) * 99} for i in range(500)]
    frames = [zstd(json.dumps(record).encode() + b"\n") for record in many]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [record for _, record in read_records(tmp_path / "a.jsonl.zst")] == many


def test_torn_zstd(tmp_path):
    """A spoilt zstd file is refused; a torn one ends within a line, which is refused as well."""
    many = (json.dumps(GOOD | {"prompt": str(i**9)}).encode() + b"\n" for i in range(5000))
    whole, path = zstd(b"".join(many)), tmp_path / "a.jsonl.zst"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert "not JSON in UTF-8 (Unterminated string" in refusal(path)
    for content in (whole[:99] + b"\xff" * 9 + whole[108:], whole[:-1] + b"\0", whole + b"more"):
        path.write_bytes(content)
        assert "cannot be read (" in refusal(path) and "; fetch the file again" in refusal(path)


def test_zstd_bomb(tmp_path):
    """A small zstd file that unpacks to gigabytes is refused after a line's limit, and never held."""
    pytest.importorskip("zstandard")
    block = (2**17 << 3 | 0b010).to_bytes(3, "little") + b"c"  # 128 KiB of "c", and not the last block
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + block * 40_000)  # 160 kB for 5 GB
    tracemalloc.start()
    number, bad = next(read_records(path))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 1 and str(bad).startswith("more than 16777216 bytes") and held < 8 * 2**24


def test_no_zstd(tmp_path, monkeypatch):
    """Without a module for zstd, the one that helps is named."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=r"a.jsonl.zst: compressed with zstd; pip install zstandard$"):
        next(read_records(tmp_path / "a.jsonl.zst"))
