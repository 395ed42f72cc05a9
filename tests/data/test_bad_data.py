"""What hostile files get: one line with file and line; or, with skip_bad, a place in the count."""

import gzip
import json
import os

import pytest
from chat_model import ASKED, RECORD, YES
from hypothesis import given, settings
from hypothesis import strategies as st

from characters import EOS, bpe
from minidpo.data import DataReport, Tokenizer, bad_record, read_preferences
from minidpo.data import records as module
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import GOOD, QUESTION, SKIP_BAD, refusal, write


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "chosen": ', "not JSON in UTF-8 (Expecting value: column 26"),
        ('{"chosen": "c"} {"rejected": "r"}', "not JSON in UTF-8 (Extra data: column 17"),
        (b'{"chosen": "\xff"}', "text in UTF-8 is read; convert the file if it is, say, Latin-1: iconv -f"),
        ('{"chosen": ' + "9" * 5000 + "}", "not JSON in UTF-8"),
        ("[", "a file that is one list of objects is named .json"),
        ('{"question": "p", "a\\nb": "c"}', "no key 'chosen'; its keys are question, 'a\\nb'; give chosen"),
        (GOOD | {"chosen": 3}, "'chosen' is of type int; give a string"),
        (GOOD | {"chosen": None}, "'chosen' is null"),
        (GOOD | {"chosen": "\ud83d"}, "'chosen' has half a surrogate pair"),
        ({"chosen": [[[]]], "rejected": [[[]]]}, "a message in 'chosen' is of type list"),
        ({"chosen": [YES], "rejected": "n"}, "a record of whole conversations"),
        (RECORD | {"prompt": [{"from": "human"}]}, "in 'prompt' has no text under 'role'"),
        (RECORD | {"prompt": [ASKED | {"content": "\ud83d"}]}, "'content' of a message in 'prompt' has"),
        (RECORD, "a record of prompt, chosen, rejected as messages in a file of prompt, chosen, rejected"),
        ({"chosen": QUESTION + " Y", "rejected": QUESTION + " N"}, "a record of HH dialogues"),
    ],
)
def test_bad_record(tmp_path, line, said):
    """A record that cannot be read is refused with its line, or skipped and counted."""
    path, report = write(tmp_path / "a.jsonl", GOOD, "", line, GOOD | {"prompt": "q"}), DataReport()
    message = refusal(path)
    assert message.startswith(":3: ") and said in message and "; " in message  # what; what would be right
    pairs = list(read_preferences(path, report, data=SKIP_BAD))
    assert [(pair.prompt, pair.index) for pair in pairs] == [("p", 0), ("q", 2)]
    ((kind, lines),) = report.files[0].dropped.items()
    assert kind in message and lines == [3]


def test_no_usable_pair(tmp_path):
    """A file without a usable pair is refused with the reasons, and its keys if none was found to read."""
    message = refusal(write(tmp_path / "a.jsonl", GOOD | {"chosen": ""}, GOOD | {"chosen": "r"}))
    assert "no usable pair in 2 records (dropped 1: nothing but blanks in a response (line 1), d" in message
    assert message.endswith("; one at least is needed")  # Other keys would not help.
    with pytest.raises(UserError, match=r"in 1 records \(dropped 1: no key 'chosen' \(line 1\)\).*its keys "):
        list(read_preferences(write(tmp_path / "b.jsonl", "{}"), data=SKIP_BAD))
    asked = {"asked": "2+2?", "chosen": "4", "rejected": "5"}  # read as dialogues, of which it is none
    keys = "; its keys are asked, chosen, rejected; give chosen, rejected, and prompt unless they hold it"
    assert keys in refusal(write(tmp_path / "c.jsonl", asked))
    assert refusal(write(tmp_path / "d.jsonl", RECORD)).startswith(":1: messages without a chat template")
    for name, content in (("a.jsonl", ""), ("a.jsonl.gz", ""), ("a.json.gz", ""), ("a.json", "[ ]")):
        assert "the file is empty" in refusal(write(tmp_path / name, content))


# Small files that are meant to fill the memory


def test_long_line(tmp_path, monkeypatch):
    """A line that is too long is refused or skipped, and never held."""
    monkeypatch.setattr(module, "LONGEST_RECORD", 1000)
    monkeypatch.setattr(bad_record, "LONGEST_RECORD", 1000)
    path = write(tmp_path / "a.jsonl.gz", GOOD, GOOD | {"chosen": "c" * 50_000}, GOOD | {"prompt": "q"})
    held, readline = [], gzip.GzipFile.readline

    def watched(file: gzip.GzipFile, size: int) -> bytes:
        held.append(readline(file, size))
        return held[-1]

    monkeypatch.setattr(gzip.GzipFile, "readline", watched)
    assert refusal(path).startswith(":2: more than 1000 bytes; ")
    assert [pair.prompt for pair in read_preferences(path, data=SKIP_BAD)] == ["p", "q"]
    assert max(map(len, held)) == 1001


def test_long_list(tmp_path, monkeypatch):
    """A list that unpacks to far more than its file is refused; one of usual size is read."""
    monkeypatch.setattr(module, "LONGEST_RECORD", 1000)
    path = write(tmp_path / "a.json.gz", json.dumps([GOOD, GOOD | {"chosen": "c" * 10**6}]))
    limit = 1000 + 100 * path.stat().st_size  # about 1 kB, which unpacks to 1 MB
    assert refusal(path).startswith(f": unpacks to more than {limit} bytes; give one object per line")
    usual = [GOOD | {"prompt": str(i)} for i in range(500)]  # 25 kB
    assert len(list(read_preferences(write(path, json.dumps(usual))))) == 500


# Files of which nothing can be read


def test_torn(tmp_path):
    """A torn file is called so. Torn or spoilt gzip data is refused after the last whole line, and cannot be
    skipped."""
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-3])
    assert refusal(tmp_path / "a.jsonl").endswith("; the file seems to be cut off here; fetch it again")
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD) + "\nmore")
    assert "is an object with chosen" in refusal(tmp_path / "a.jsonl")
    path = write(tmp_path / "a.jsonl.gz", *(GOOD | {"chosen": f"{i * 7919 % 1000}" * 9} for i in range(2000)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert 500 < int(refusal(path).split(":")[1]) < 1500 and "fetch the file again" in refusal(path)
    with pytest.raises(UserError, match="cannot be read"):
        list(read_preferences(path, data=SKIP_BAD))
    path.write_bytes(whole[:10] + b"\xff" * 9 + whole[19:])  # The header is there, the data is not.
    assert refusal(path).startswith(":1: cannot be read")
    path.write_bytes(whole[:-6] + b"\x00" * 6)  # Every line is there, the checksum is not.
    assert "cannot be read (CRC check failed" in refusal(path)


def test_no_file(tmp_path):
    """What is no file, or no file of a known kind, is refused; a pipe is not waited for; a link is read."""
    assert "; name a file that can be read (.jsonl, " in refusal(tmp_path / "a")
    assert refusal(write(tmp_path / "a.txt", GOOD)).endswith("; convert it to .jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "null.jsonl").symlink_to("/dev/null")
    for name in ("pipe.jsonl", "null.jsonl"):
        assert refusal(tmp_path / name).startswith(": not a regular file; name one")
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path / "a.jsonl", GOOD))
    assert len(list(read_preferences(tmp_path / "link.jsonl"))) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[\n{"prompt": "p"', ": not JSON in UTF-8 (Expecting ',' delimiter: line 2 column 15"),
        ("[{}]\nmore", ": not JSON in UTF-8 (Extra data: line 2 column 1 (char 5)); a record is an object"),
        (b'[\n\n"\xff"]', ": not JSON in UTF-8 ('utf-8' codec"),
        ("[" * 200_000, ": not JSON in UTF-8 (maximum recursion depth"),
        (json.dumps([GOOD, 7]), ": record 1: a JSON int; a record is an object"),
        ('{"prompt":\n "p"', ":1: not JSON in UTF-8"),
        ("{}".encode("utf-16"), ": text in UTF-16, and UTF-8 is read; convert it: iconv -f utf-16"),
        ("version https://git-lfs.github.com/spec/v1\n", ": a git-lfs pointer"),
        ("\n<!DOCTYPE html>\n<html>", ": a web page, not data; download the file"),
    ],
)
def test_broken_file(tmp_path, content, said):
    """A broken list is refused with line and column, and what only looks like a text file by its kind."""
    assert refusal(write(tmp_path / "a.json", content)).startswith(said)


# Whatever a file holds: pairs that can be used, or one line

HH = Tokenizer(bpe(), EOS).chat_template("hh")
words = st.sampled_from("prompt chosen rejected role content margin user assistant".split())
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
messages = st.lists(st.fixed_dictionaries({"role": words | values, "content": values}), max_size=3)
texts = {"chosen": values | messages, "rejected": values | messages}
records = st.fixed_dictionaries(texts, optional={"prompt": values | messages, "margin": values})
lines = st.one_of(records, values).map(json.dumps) | st.just(json.dumps(GOOD))


@settings(max_examples=150, deadline=None)
@given(st.lists(lines.map(str.encode) | st.binary(max_size=60)), st.booleans(), st.booleans())
def test_anything(tmp_path_factory, lines, is_list, skip_bad):
    """Whatever a file holds, it gives pairs that can be used, or one line."""
    path = tmp_path_factory.mktemp("any") / ("a.json" if is_list else "a.jsonl")
    path.write_bytes(b"[" + b",".join(lines) + b"]" if is_list else b"\n".join(lines))
    try:
        pairs = [*read_preferences(path, template=HH, data=DataSection(skip_bad=skip_bad))]
    except UserError as error:
        assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
    else:
        assert pairs and all(text.strip() for pair in pairs for text in pair.responses)
