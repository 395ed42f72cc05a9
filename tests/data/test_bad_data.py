"""What hostile files get: one line with file and line; or, with skip_bad, a place in the count."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.data import ChatTemplate, DataReport, read_preferences, records
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
        ('{"prompt": "p", "chosen": ', "not JSON in UTF-8 (Expecting value: column 26"),
        ('{"chosen": "c"} {"rejected": "r"}', "not JSON in UTF-8 (Extra data: column 17"),
        ("\x00\x00\x00", "not JSON in UTF-8 (Expecting value: column 1 "),
        ('{"prompt": "\x00", "chosen": "c", "rejected": "r"}', "(Invalid control character at: column 13"),
        (json.dumps(GOOD).encode().replace(b"c", b"\xff"), "not JSON in UTF-8 ('utf-8' codec can't decode"),
        ("[" * 200_000, "not JSON in UTF-8"),
        ('{"chosen": ' + "9" * 5000 + "}", "not JSON in UTF-8"),
        ('{"prompt": "p", "chosen": "c"}', "no key 'rejected'"),
        ('{"prompt": "p", "rejected": "r"}', "no key 'chosen'"),
        ('{"prompt": "p", "chosen": 3, "rejected": "r"}', "'chosen' is of type int; give a string"),
        ('{"prompt": null, "chosen": "c", "rejected": "r"}', "'prompt' is of type NoneType"),
        ('{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}', "half a surrogate pair"),
        (
            '{"chosen": [{"role": "user"}], "rejected": "r"}',
            "a message in 'chosen' has no text under 'content'",
        ),
        ('{"chosen": [[[[]]]], "rejected": [[[[]]]]}', "a message in 'chosen' has no text under 'role'"),
        ('["p", "c", "r"]', "a JSON list"),
        ("null", "a JSON NoneType"),
        ({"chosen": QUESTION + " Y", "rejected": QUESTION + " N"}, "a record of HH dialogues"),
        (MESSAGES, "a record of prompt, chosen, rejected as messages in a file of prompt, chosen, rejected"),
    ],
)
def test_bad_record(tmp_path, line, said):
    """A record that cannot be read is refused with its line, or skipped and counted."""
    path, report = write(tmp_path / "a.jsonl", GOOD, "", line, {**GOOD, "prompt": "q"}), DataReport()
    message = refusal(path)
    assert message.startswith(":3: ") and "; " in message  # what; what would be right
    assert said in message
    kept = list(read_preferences(path, report, skip_bad=True))
    assert [(pair.prompt, pair.index) for pair in kept] == [("p", 0), ("q", 2)]
    ((reason, numbers),) = report.files[0].dropped.items()
    assert reason in message and numbers == [3]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chosen": "y"}, "'chosen' is no list of messages; give one"),
        ({"rejected": NO}, "'rejected' is no list of messages"),
        ({"prompt": "q", "rejected": "n"}, "'rejected' is no list of messages"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "no text under 'content'"),
        ({"prompt": [{"from": "human", "value": "q"}]}, "no text under 'role'"),
        ({"prompt": [{**USER, "content": "\ud83d"}]}, "half a surrogate pair"),
        ({}, "messages without a chat template"),
    ],
)
def test_bad_messages(tmp_path, changed, said):
    """Messages that are none are refused with their key."""
    assert said in refusal(write(tmp_path / "a.jsonl", MESSAGES | changed))


def test_count_by_kind(tmp_path):
    """Records that fail alike are counted together."""
    lines = ['{"a', '{"a": 1, "b', {"chosen": "c"}, {"rejected": "r"}, {"x": 1}]
    path, report = write(tmp_path / "a.jsonl", GOOD, *lines), DataReport()
    assert len(list(read_preferences(path, report, skip_bad=True))) == report.files[0].kept == 1
    alike = {"not JSON in UTF-8": [2, 3], "no key 'rejected'": [4], "no key 'chosen'": [5, 6]}
    assert report.files[0].dropped == alike


def test_endless_line(tmp_path, monkeypatch):
    """A line too long is refused or skipped, and only a part held: a small gzip file cannot fill memory."""
    held = []

    class File(io.BytesIO):
        def readline(self, size: int) -> bytes:
            held.append(super().readline(size))
            return held[-1]

    monkeypatch.setattr(records, "LONGEST_RECORD", 1000)
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": "c" * 50_000}, {**GOOD, "prompt": "q"})
    assert refusal(path).startswith(":2: more than 1000 bytes; ")
    assert [pair.prompt for pair in read_preferences(path, skip_bad=True)] == ["p", "q"]
    assert [number for number, _ in records._records_of_lines(File(path.read_bytes()))] == [1, 2, 3]
    assert max(map(len, held)) == 1001


# Files: nothing in them can be skipped


def test_torn_gzip(tmp_path):
    """A torn gzip file is refused after the last whole line."""
    lines = [{**GOOD, "chosen": f"{i * 7919 % 1000}" * 9} for i in range(2000)]
    path = write(tmp_path / "a.jsonl.gz", *lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert 500 < int(refusal(path).split(":")[1]) < 1500 and "fetch the file again" in refusal(path)
    with pytest.raises(UserError, match="cannot be read"):
        list(read_preferences(path, skip_bad=True))
    path.write_bytes(whole[:10] + b"\xff" * 9 + whole[19:])  # the header is there, the data is not
    assert refusal(path).startswith(":1: cannot be read")
    path.write_bytes(whole[:-6] + b"\x00" * 6)  # every line is there, the checksum is not
    assert "cannot be read (CRC check failed" in refusal(path)


def test_no_file(tmp_path):
    """Paths that are no file, files of another kind and empty files are refused."""
    assert "No such file" in refusal(tmp_path / "missing.jsonl")
    assert "Is a directory" in refusal(tmp_path)
    for name in ("a.txt", "a.csv", "a.parquet"):
        assert refusal(write(tmp_path / name, GOOD)).endswith("; convert it to .jsonl")
    for name in ("empty.jsonl", "empty.jsonl.gz", "empty.json", "empty.json.gz"):
        assert "the file is empty" in refusal(write(tmp_path / name))
    (tmp_path / "zero.jsonl.gz").write_bytes(b"")
    assert "the file is empty" in refusal(tmp_path / "zero.jsonl.gz")
    assert "the file is empty" in refusal(write(tmp_path / "none.json", "[ ]"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[\n{"prompt": "p"', ": not JSON in UTF-8 (Expecting ',' delimiter: line 2 column 15"),
        (
            json.dumps([GOOD])[:-1] + "\n\n{}]",
            ": not JSON in UTF-8 (Expecting ',' delimiter: line 3 column 1",
        ),
        (json.dumps([GOOD]) + "\nmore", ": not JSON in UTF-8 (Extra data: line 2 column 1"),
        (b'[\n\n"\xff"]', ": not JSON in UTF-8 ('utf-8' codec"),
        ("[" * 200_000, ": not JSON in UTF-8 (maximum recursion depth"),
        (json.dumps([GOOD, 7]), ": record 1: a JSON int; a record is an object"),
        ('{"prompt":\n "p"}', ":1: not JSON in UTF-8"),
    ],
)
def test_broken_list(tmp_path, content, said):
    """A broken list is refused with line and column, and what is no record in it with its number."""
    assert refusal(write(tmp_path / "a.json", content)).startswith(said)


def test_no_usable_pair(tmp_path):
    """A file without a usable pair is refused with the reasons."""
    message = refusal(write(tmp_path / "a.jsonl", {**GOOD, "chosen": ""}, {**GOOD, "chosen": "r"}))
    assert (
        "no usable pair in 2 records (dropped 1: nothing but blanks in a response (line 1), dropped 1: "
        in message
    )
    with pytest.raises(
        UserError, match=r"no usable pair in 1 records \(dropped 1: no key 'chosen' \(line 1\)\)"
    ):
        list(read_preferences(write(tmp_path / "b.jsonl", "{}"), skip_bad=True))


# Whatever a file holds: pairs that can be used, or one line

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
words = st.sampled_from(
    ["prompt", "chosen", "rejected", "role", "content", "margin", "user", "assistant", "x"]
)
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
message = st.fixed_dictionaries({"role": words | values, "content": values})
record = st.dictionaries(words, values, max_size=5) | st.fixed_dictionaries(
    {"chosen": values | st.lists(message, max_size=3), "rejected": values | st.lists(message, max_size=3)},
    optional={"prompt": values | st.lists(message, max_size=2), "margin": values},
)


def pairs_or_one_line(path: Path, skip_bad: bool) -> None:
    try:
        pairs = list(read_preferences(path, template=ChatTemplate("hh", None, "</s>"), skip_bad=skip_bad))
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
    else:
        assert pairs and all(pair.chosen.strip() and pair.rejected.strip() for pair in pairs)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([json.dumps(GOOD).encode(), b"", b"{}", b"\x1f\x8b"])),
    st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json"]),
    st.booleans(),
)
def test_any_bytes(tmp_path_factory, lines, name, skip_bad):
    """Any bytes give pairs or one line."""
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(b"\n".join(lines))
    pairs_or_one_line(path, skip_bad)


@settings(max_examples=150, deadline=None)
@given(st.lists(record | values, max_size=4), st.booleans(), st.booleans())
def test_any_json(tmp_path_factory, content, as_list, skip_bad):
    """Any JSON gives pairs or one line."""
    path = tmp_path_factory.mktemp("fuzz") / ("a.json" if as_list else "a.jsonl")
    path.write_text(json.dumps(content) if as_list else "\n".join(map(json.dumps, content)))
    pairs_or_one_line(path, skip_bad)
