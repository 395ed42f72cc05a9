"""Every shape of record in every kind of file is read right, and what is left out is counted."""

import json

import pytest

from minidpo.data import ChatTemplate, DataReport, PreferencePair, preferences, read_preferences
from record_files import GOOD, QUESTION, write

EMPTY_RESPONSE = "nothing but blanks in a response"
IDENTICAL = "chosen and rejected are identical"
NO_PROMPT = "no prompt: chosen and rejected share no turn, or `prompt` has none"
NOT_ONE_TURN = "a response is not one assistant turn"

TALK = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("user", "r"))]
YES, NO = ({"role": "assistant", "content": text} for text in ("y", "n"))
HH_TEXT = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
HH_TEMPLATE = ChatTemplate("hh", None, "</s>")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
@pytest.mark.parametrize(
    ("record", "shape", "pair"),
    [
        ({**GOOD, "source": 2}, preferences.PROMPT_AND_RESPONSES, PreferencePair("p", "c", "r")),
        (
            {"chosen": QUESTION + " Yes.", "rejected": QUESTION + " No."},
            preferences.HH_DIALOGUES,
            PreferencePair(QUESTION, " Yes.", " No."),
        ),
        (
            {"prompt": TALK, "chosen": [YES], "rejected": [NO]},
            preferences.MESSAGES,
            PreferencePair(HH_TEXT, " y", " n"),
        ),
        (
            {"prompt": "q", "chosen": [*TALK, YES], "rejected": [*TALK, NO]},  # as UltraFeedback is published
            preferences.CONVERSATIONS,
            PreferencePair(HH_TEXT, " y", " n"),
        ),
    ],
)
def test_shapes(tmp_path, name, record, shape, pair):
    """The first record decides the shape, in every kind of file."""
    path, report = write(tmp_path / name, record), DataReport()
    if name.startswith("a.json") and "l" not in name:
        path = write(tmp_path / name, json.dumps([record], indent=1))
    assert list(read_preferences(path, report, template=HH_TEMPLATE)) == [pair]
    assert f"{path}: {shape}: 1 records read, 1 kept" in report.lines()


def test_list(tmp_path):
    """A list is read like lines, and each record has its number from 0."""
    path, report = tmp_path / "a.json", DataReport()
    records = [GOOD, {**GOOD, "chosen": " "}, {**GOOD, "prompt": "q\n\u2028"}]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(records, indent=1, ensure_ascii=False).encode())
    assert [(p.prompt, p.index) for p in read_preferences(path, report)] == [("p", 0), ("q\n\u2028", 2)]
    assert f"  dropped 1: {EMPTY_RESPONSE} (record 1)" in report.lines()
    path.write_text("\n".join(map(json.dumps, records)))  # lines under the name of a list
    assert [p.index for p in read_preferences(path)] == [0, 2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([*TALK, YES], [*TALK[:2], NO], NOT_ONE_TURN),
        ([*TALK, YES], [TALK[0], NO, TALK[2], NO], NOT_ONE_TURN),  # the turns differ before the last
        ([*TALK, YES], [*TALK, YES, TALK[0], NO], NOT_ONE_TURN),
        ([*TALK, YES], [*TALK], NOT_ONE_TURN),
        ([TALK[0]], [TALK[2]], NO_PROMPT),
        ([YES], [NO], NO_PROMPT),
        ([], [*TALK, NO], NO_PROMPT),
        ([TALK[1], TALK[0]], [TALK[1], NO], NOT_ONE_TURN),  # a user turn is no response
        ([*TALK, YES], [*TALK, {**NO, "content": " \n"}], EMPTY_RESPONSE),
        ([*TALK, YES], [*TALK, YES], IDENTICAL),
    ],
)
def test_unusable_conversations(tmp_path, chosen, rejected, reason):
    """Conversations that are no pair are dropped and counted."""
    good = {"chosen": [*TALK, YES], "rejected": [*TALK, NO]}
    path = write(tmp_path / "a.jsonl", good, {"chosen": chosen, "rejected": rejected})
    for kind in ("hh", "chatml"):  # chatml writes something around a blank response
        template, report = ChatTemplate(kind, None, "</s>"), DataReport()
        assert [p.index for p in read_preferences(path, report, template=template)] == [0]
        assert report.files[0].dropped == {reason: [2]}


def test_shared_turns(tmp_path):
    """The prompt of conversations is all the turns they share, even if their other keys differ."""
    twice = [*TALK, YES]  # two assistant turns in a row: the first is shared
    scored = [{**turn, "score": 1} for turn in twice]
    path = write(tmp_path / "a.jsonl", {"chosen": [*twice, YES], "rejected": [*scored, NO]})
    (pair,) = read_preferences(path, template=HH_TEMPLATE)
    assert (pair.prompt, pair.chosen) == (HH_TEXT + " y\n\nAssistant:", " y")


@pytest.mark.parametrize(
    ("keys", "margin"),
    [
        ({"margin": 2}, 2.0),
        ({"margin": -0.5, "score_chosen": 9, "score_rejected": 1}, -0.5),
        ({"score_chosen": 9, "score_rejected": 1.5}, 7.5),
        *((keys, None) for keys in ({}, {"score_chosen": 9}, {"score_chosen": 9, "score_rejected": None})),
        *(({"margin": margin}, None) for margin in ("much better", True, float("nan"), 10**400)),
    ],
)
def test_margin(tmp_path, keys, margin):
    """A margin is a finite number, or the difference of two scores."""
    (pair,) = read_preferences(write(tmp_path / "a.jsonl", GOOD | keys))
    assert pair.margin == margin


def test_blank_lines(tmp_path):
    """A byte order mark, CRLF and blank lines change nothing but line numbers."""
    path, report = tmp_path / "a.jsonl", DataReport()
    good, blank = json.dumps(GOOD), json.dumps({**GOOD, "chosen": " "})
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["", good, "   ", blank, "", good]).encode())
    assert [pair.index for pair in read_preferences(path, report)] == [0, 2]
    assert report.files[0].dropped == {EMPTY_RESPONSE: [4]}


def test_gzip_by_content(tmp_path):
    """A gzip file is known by its content, not by its name."""
    packed = write(tmp_path / "a.jsonl.gz", GOOD)
    unpacked = write(tmp_path / "a.jsonl", GOOD)
    packed.rename(tmp_path / "b.jsonl")
    unpacked.rename(tmp_path / "b.jsonl.gz")
    for name in ("b.jsonl", "b.jsonl.gz"):
        assert list(read_preferences(tmp_path / name)) == [PreferencePair("p", "c", "r")]


def test_unicode_line_breaks(tmp_path):
    """Unicode's line breaks inside a text do not break the line."""
    text = "one\u2028two\u0085three \U0001f600 \x00"
    path = write(tmp_path / "a.jsonl", json.dumps({**GOOD, "chosen": text}, ensure_ascii=False))
    assert next(read_preferences(path)).chosen == text


def test_identical_responses(tmp_path):
    """Identical responses are dropped unless they are asked for."""
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": "r"})
    assert [pair.index for pair in read_preferences(path)] == [0]
    assert [pair.index for pair in read_preferences(path, drop_identical=False)] == [0, 1]


def test_report(tmp_path):
    """The report says what was read, kept and dropped, with the first lines."""
    blank = {**GOOD, "rejected": "\n"}
    path, report = write(tmp_path / "a.jsonl", GOOD, *[blank] * 7), DataReport()
    list(read_preferences(path, report))
    assert list(report.lines()) == [
        f"{path}: prompt, chosen, rejected: 8 records read, 1 kept",
        "  dropped 7: nothing but blanks in a response (line 2, 3, 4, 5, 6, ...)",
    ]
