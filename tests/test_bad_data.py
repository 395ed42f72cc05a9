"""What hostile files get: one line with file and line; or, with skip_bad, a place in the count."""

import io
import json
import shlex

import pytest

from minidpo import formats, records
from minidpo.data import DataReport, PreferencePair, read_preferences
from minidpo.errors import UserError
from record_files import GOOD, QUESTION, refusal, write

USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
)
MESSAGES = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}


# Records: each one refused with its line, or skipped and counted


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "chosen": ', "broken JSON at column 26"),
        ('{"chosen": "c"} {"rejected": "r"}', "broken JSON at column 17"),
        ('{"prompt": "p", "chosen": "c"}', "no key 'rejected'"),
        ('{"prompt": "p", "rejected": "r"}', "no key 'chosen'"),
        ('{"prompt": "p", "chosen": 3, "rejected": "r"}', "'chosen' is of type int; give a string"),
        ('{"prompt": null, "chosen": "c", "rejected": "r"}', "'prompt' is of type NoneType"),
        ('{"chosen": [{"role": "user"}], "rejected": "r"}', "no text under 'content' (number 0 from 0)"),
        ('{"chosen": [[[[]]]], "rejected": [[[[]]]]}', "a message in 'chosen' has no text under 'role'"),
        ('{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}', "half a surrogate pair"),
        ('["p", "c", "r"]', "a JSON list"),
        ("null", "a JSON NoneType"),
        ("\x00\x00\x00", "broken JSON at column 1"),
        ('{"prompt": "\x00", "chosen": "c", "rejected": "r"}', "broken JSON at column 13 (Invalid control"),
        (
            json.dumps(GOOD).encode().replace(b"c", b"\xff"),
            "not JSON in UTF-8 ('utf-8' codec can't decode byte 0xff",
        ),
        ("[" * 200_000, "not JSON in UTF-8"),
        ('{"chosen": ' + "9" * 5000 + "}", "not JSON in UTF-8"),
        ({"chosen": QUESTION + " Y", "rejected": QUESTION + " N"}, "a record of HH dialogues"),
        (MESSAGES, "a record of prompt, chosen, rejected as messages in a file that began with prompt"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused_with_its_line_or_skipped_and_counted(tmp_path, line, said):
    path, report = write(tmp_path / "a.jsonl", GOOD, "", line, {**GOOD, "prompt": "q"}), DataReport()
    message = refusal(path)
    assert message.startswith(":3: ") and "; " in message  # what; what would be right
    assert said in message
    kept = list(read_preferences(path, report, skip_bad=True))
    assert [(pair.prompt, pair.index) for pair in kept] == [("p", 0), ("q", 2)]
    ((reason, places),) = report.files[0].dropped.items()
    assert reason in message and places == [3]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"prompt": [USER], "chosen": "y", "rejected": "n"},
            "'chosen' is of type str beside messages; give a list",
        ),
        ({"prompt": [USER], "chosen": [YES], "rejected": NO}, "'rejected' is of type dict beside messages"),
        ({"chosen": [USER, YES], "rejected": "n"}, "'rejected' is of type str beside messages"),
        (
            {"chosen": [USER, {"role": "assistant", "content": None}], "rejected": [USER, NO]},
            "(number 1 from 0)",
        ),
        (
            {"prompt": [{"from": "human", "value": "q"}], "chosen": [YES], "rejected": [NO]},
            "no text under 'role'",
        ),
        (
            {"prompt": [{**USER, "content": "\ud83d"}], "chosen": [YES], "rejected": [NO]},
            "half a surrogate pair",
        ),
        (MESSAGES, "messages without a chat template"),
    ],
)
def test_messages_that_are_none_are_refused_with_key_and_place(tmp_path, record, said):
    assert said in refusal(write(tmp_path / "a.jsonl", record))


def test_records_that_fail_alike_are_counted_together(tmp_path):
    lines = ['{"a', '{"a": 1, "b', {"chosen": "c"}, {"rejected": "r"}, {"x": 1}]
    path, report = write(tmp_path / "a.jsonl", GOOD, *lines), DataReport()
    assert len(list(read_preferences(path, report, skip_bad=True))) == 1
    assert report.files[0].dropped == {
        "broken JSON": [2, 3],
        "no key 'rejected'": [4],
        "no key 'chosen'": [5, 6],
    }
    assert report.files[0].kept == 1


def test_a_line_of_50_mb_is_refused_or_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": "c" * 50_000_000}, {**GOOD, "prompt": "q"})
    assert refusal(path).startswith(":2: a record of more than 16 MiB; ")
    assert [pair.prompt for pair in read_preferences(path, skip_bad=True)] == ["p", "q"]


def test_of_a_line_too_long_only_a_part_is_held_so_that_a_small_gzip_file_cannot_fill_memory(monkeypatch):
    held = []

    class File(io.BytesIO):
        def readline(self, size: int) -> bytes:
            line = super().readline(size)
            held.append(len(line))
            return line

    monkeypatch.setattr(records, "LONGEST_RECORD", 1000)
    lines = list(records._lines(File(b"{}\n" + b"x" * 50_000 + b"\n" + b"{}\n")))
    assert [number for number, _ in lines] == [1, 2, 3] and lines[2][1] == b"{}\n"
    assert max(held) == 1001


# Files: nothing in them can be skipped


def test_a_torn_gzip_file_is_refused_after_the_last_whole_line(tmp_path):
    lines = [{**GOOD, "chosen": f"{i * 7919 % 1000}" * 9} for i in range(2000)]
    path = write(tmp_path / "a.jsonl.gz", *lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    number = int(refusal(path).split(":")[1])
    assert 500 < number < 1500 and "torn gzip data" in refusal(path)
    with pytest.raises(UserError, match="torn gzip data"):
        list(read_preferences(path, skip_bad=True))
    path.write_bytes(whole[:10] + b"\xff" * 9 + whole[19:])  # the header is there, the data is not
    assert refusal(path).startswith(":1: torn gzip data")
    path.write_bytes(whole[:-6] + b"\x00" * 6)  # every line is there, the checksum is not
    assert "torn gzip data" in refusal(path)


def test_files_that_are_none_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "missing.jsonl")
    assert "is a directory" in refusal(tmp_path)
    assert "unknown kind of file" in refusal(write(tmp_path / "a.txt", GOOD))
    for name in ("empty.jsonl", "empty.jsonl.gz", "empty.json", "empty.json.gz"):
        assert "no record" in refusal(write(tmp_path / name))
    (tmp_path / "zero.jsonl.gz").write_bytes(b"")
    assert "no record" in refusal(tmp_path / "zero.jsonl.gz")
    assert "no record" in refusal(write(tmp_path / "none.json", "[ ]"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '[\n{"prompt": "p"',
            ":3: broken JSON at column 1 (Expecting ',' delimiter); give a list of objects",
        ),
        (json.dumps([GOOD])[:-1] + "\n\n{}]", ":3: broken JSON at column 1 (Expecting ',' or ']')"),
        (json.dumps([GOOD])[:-1] + "\n,]", ":2: broken JSON at column 2 (Expecting value)"),
        (json.dumps([GOOD]) + "\nmore", ":2: broken JSON at column 1 (Extra data)"),
        (b'[\n\n"\xff"]', ":3: not JSON in UTF-8"),
        ("[" * 200_000, ":1: not JSON that can be read"),
        ("[\n\n7]", ":3: a JSON int; a record is an object"),
        ('{"prompt":\n "p"}', ":1: broken JSON"),
    ],
)
def test_a_broken_list_is_refused_with_its_line(tmp_path, content, said):
    assert refusal(write(tmp_path / "a.json", content)).startswith(said)


def test_a_file_without_a_usable_pair_is_refused_with_the_reasons(tmp_path):
    path = write(tmp_path / "a.jsonl", {**GOOD, "chosen": ""}, {**GOOD, "chosen": "r"})
    assert "no usable pair in 2 records" in refusal(path)
    assert formats.EMPTY_ENDING in refusal(path) and formats.IDENTICAL in refusal(path)
    with pytest.raises(UserError, match=r"no usable pair in 1 records \(dropped 1: broken JSON \(line 1\)\)"):
        list(read_preferences(write(path, "{"), skip_bad=True))


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_other_kinds_of_file_are_refused_with_the_command_that_converts_them(tmp_path, suffix):
    message = refusal(tmp_path / f"a{suffix}")
    assert "convert it: python -c " in message and str(tmp_path / "a.jsonl") in message


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_the_command_that_converts_keeps_every_text(tmp_path, suffix):
    pandas = pytest.importorskip("pandas")
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    rows = [
        {"prompt": "007", "chosen": "NA", "rejected": "12"},
        {"prompt": "08", "chosen": "é\n\u2028, 5", "rejected": 'no, "no"'},
    ]
    frame, path = pandas.DataFrame(rows), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    _, _, command = refusal(path).partition("convert it: ")
    python, option, program = shlex.split(command)
    assert (python, option) == ("python", "-c")
    exec(program)
    assert list(read_preferences(path.with_suffix(".jsonl"))) == [PreferencePair(**row) for row in rows]
