"""Every shape of record in every kind of file is read right, and what is left out is counted."""

import json

import pytest

from minidpo.data import ChatTemplate, DataReport, PreferencePair, read_preferences
from record_files import GOOD, QUESTION, write

HH = ChatTemplate("hh", None, "</s>")
USER, ANSWER, AGAIN = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))
)
YES, NO = ({"role": "assistant", "content": text} for text in ("y", "n"))
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [SYSTEM, USER, ANSWER, AGAIN]
ASKED = "Be brief.\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"  # TALK as hh has it

DIALOGUES = {"chosen": QUESTION + " Yes.", "rejected": QUESTION + " No."}
MESSAGES = {"prompt": TALK, "chosen": [YES], "rejected": [NO]}
CONVERSATIONS = {"prompt": "q", "chosen": [*TALK, YES], "rejected": [*TALK, NO]}  # as UltraFeedback has them


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
@pytest.mark.parametrize(
    ("shape", "record", "pair"),
    [
        ("prompt, chosen, rejected", GOOD, ("p", "c", "r")),
        ("HH dialogues (chosen, rejected)", DIALOGUES, (QUESTION, " Yes.", " No.")),
        ("prompt, chosen, rejected as messages", MESSAGES, (ASKED, " y", " n")),
        ("whole conversations (chosen, rejected)", CONVERSATIONS, (ASKED, " y", " n")),
    ],
)
def test_shapes(tmp_path, name, shape, record, pair):
    """The first record decides the shape, in every kind of file."""
    content = record if "jsonl" in name else json.dumps([record], indent=1)
    path, report = write(tmp_path / name, content), DataReport()
    assert list(read_preferences(path, report, template=HH)) == [PreferencePair(*pair)]
    assert list(report.lines()) == [f"{path}: {shape}: 1 records read, 1 kept"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([*TALK, YES], TALK, "a response does not begin and end with a turn of the assistant"),
        ([USER, AGAIN], [USER, NO], "a response does not begin and end with a turn of the assistant"),
        ([YES], [NO], "no prompt: chosen and rejected share no turn, or `prompt` has none"),
        ([], [*TALK, NO], "no prompt: chosen and rejected share no turn, or `prompt` has none"),
        ([*TALK, YES], [*TALK, NO | {"content": " \n"}], "nothing but blanks in a response"),
        ([*TALK, YES], [*TALK, YES], "chosen and rejected are identical"),
    ],
)
@pytest.mark.parametrize("kind", ["hh", "chatml"])  # chatml writes something around a blank response
def test_unusable(tmp_path, kind, chosen, rejected, reason):
    """Conversations that are no pair are dropped and counted."""
    path = write(tmp_path / "a.jsonl", CONVERSATIONS, {"chosen": chosen, "rejected": rejected})
    report = DataReport()
    pairs = list(read_preferences(path, report, template=ChatTemplate(kind, None, "</s>")))
    assert [pair.index for pair in pairs] == [0] and report.files[0].dropped == {reason: [2]}


@pytest.mark.parametrize(
    ("keys", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"margin": -0.5, "score_chosen": 9, "score_rejected": 1}, -0.5),
        ({"score_chosen": 9, "score_rejected": 1.5}, 7.5),
        ({"score_chosen": 9, "score_rejected": None}, None),
        *(({"margin": margin}, None) for margin in ("much better", True, float("nan"), 10**400)),
    ],
)
def test_margin(tmp_path, keys, margin):
    """A margin is a finite number, or the difference of two scores."""
    (pair,) = read_preferences(write(tmp_path / "a.jsonl", GOOD | keys))
    assert pair.margin == margin


BREAKS = "\u2028\u0085 \U0001f600"  # Unicode's line breaks do not end a line.


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [("a.jsonl", "\r\nGOOD\r\n  \r\nBAD\r\nGOOD", "line 4"), ("a.json", "[GOOD,\n\nBAD, GOOD]", "record 1")],
)
def test_numbers(tmp_path, name, text, place):
    """Byte order mark and blank lines are no records; pairs and lists count from 0, lines from 1."""
    good = json.dumps(GOOD | {"chosen": BREAKS}, ensure_ascii=False)
    text = text.replace("GOOD", good).replace("BAD", json.dumps(GOOD | {"chosen": " "}))
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    report = DataReport()
    pairs = read_preferences(tmp_path / name, report)
    assert [(pair.index, pair.chosen) for pair in pairs] == [(0, BREAKS), (2, BREAKS)]
    assert f"  dropped 1: nothing but blanks in a response ({place})" in report.lines()


def test_names(tmp_path):
    """The content of a file decides, not its name: gzip without .gz, lines under .json."""
    packed = write(tmp_path / "a.jsonl.gz", GOOD).rename(tmp_path / "packed.jsonl")
    unpacked = write(tmp_path / "a.jsonl", GOOD).rename(tmp_path / "unpacked.jsonl.gz")
    for path in (packed, unpacked, write(tmp_path / "lines.json", GOOD, GOOD)):
        assert next(read_preferences(path)) == PreferencePair("p", "c", "r")


def test_report(tmp_path):
    """The report names the first lines of what was dropped; equal responses are, unless they are wanted."""
    path, report = write(tmp_path / "a.jsonl", GOOD, *[GOOD | {"chosen": "r"}] * 7), DataReport()
    list(read_preferences(path, report))
    said = "  dropped 7: chosen and rejected are identical (line 2, 3, 4, 5, 6, ...)"
    assert list(report.lines()) == [f"{path}: prompt, chosen, rejected: 8 records read, 1 kept", said]
    assert len(list(read_preferences(path, drop_identical=False))) == 8
