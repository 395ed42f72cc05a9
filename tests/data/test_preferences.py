"""What of a file is left out and counted; HH-RLHF's dialogues, split where the last response begins."""

import gzip
import json
from pathlib import Path

import pytest
from chat_model import NO, YES, turn

from characters import EOS, bpe
from minidpo.data import DataReport, PreferencePair, Tokenizer, read_preferences, split_hh
from record_files import GOOD, QUESTION, write

USER, AGAIN = turn("user", "q"), turn("user", "r")
TALK = [turn("system", "Be brief."), USER, turn("assistant", "a"), AGAIN]
CONVERSATIONS = {"prompt": "q", "chosen": [*TALK, YES], "rejected": [*TALK, NO]}  # as UltraFeedback has them


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([*TALK, YES], TALK, "a response does not begin and end with a turn of the assistant"),
        ([USER, AGAIN], [USER, NO], "a response does not begin and end with a turn of the assistant"),
        ([YES], [NO], "no prompt: chosen and rejected share no turn, or `prompt` has none"),
        ([*TALK, YES], [*TALK, NO | {"content": " \n"}], "nothing but blanks in a response"),
        ([*TALK, YES], [*TALK, YES], "chosen and rejected are identical"),
    ],
)
def test_unusable(tmp_path, chosen, rejected, reason):
    """Conversations that are no pair are dropped and counted."""
    path = write(tmp_path / "a.jsonl", CONVERSATIONS, {"chosen": chosen, "rejected": rejected})
    report = DataReport()  # chatml writes something around a blank response.
    pairs = list(read_preferences(path, report, template=Tokenizer(bpe(), EOS).chat_template("chatml")))
    assert [pair.index for pair in pairs] == [0] and report.files[0].dropped == {reason: [2]}


@pytest.mark.parametrize(
    ("keys", "margin"),
    [
        ({"margin": -0.5, "score_chosen": 9, "score_rejected": 1}, -0.5),
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


def test_report(tmp_path):
    """The report names the first lines of what was dropped; equal responses are, unless they are wanted."""
    path, report = write(tmp_path / "a.jsonl", GOOD, *[GOOD | {"chosen": "r"}] * 7), DataReport()
    list(read_preferences(path, report))
    said = "  dropped 7: chosen and rejected are identical (line 2, 3, 4, 5, 6, ...)"
    assert list(report.lines()) == [f"{path}: prompt, chosen, rejected: 8 records read, 1 kept", said]
    assert len(list(read_preferences(path, drop_identical=False))) == 8


# HH-RLHF's dialogues

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "hh"
NO_TURN = "no '\\n\\nAssistant:' in a dialogue"
OTHER_PROMPT = "chosen and rejected differ before the last '\\n\\nAssistant:'"
BLANK = "nothing but blanks in a response"


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [
        (QUESTION + " Yes.\n\nHuman: Sure?\n\nAssistant:", " I am."),
        (QUESTION + " Well.\n\nAssistant:", " Yes."),  # two assistant turns in a row
        (QUESTION, " Now."),  # The longest common prefix would go on to " No".
        *((QUESTION, " Yes." + text) for text in (" Assistant:", "\nAssistant:", "\n\nHuman: And 3?")),
    ],
)
def test_split(prompt, chosen):
    """The prompt runs through the last assistant marker, and nothing is lost."""
    assert split_hh(prompt + chosen, prompt + " No.") == PreferencePair(prompt, chosen, " No.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (QUESTION + " Yes.", QUESTION.replace("four", "five") + " Yes.", OTHER_PROMPT),
        (QUESTION + " Yes.", QUESTION + " Er.\n\nHuman: What?\n\nAssistant: No.", OTHER_PROMPT),
        (QUESTION + " Yes.", QUESTION + " \n", BLANK),
        ("Is 2 + 2 four? Yes.", QUESTION + " No.", NO_TURN),
        ("", "", NO_TURN),
    ],
)
def test_no_pair(chosen, rejected, reason):
    """Dialogues that are no pair are refused with the reason."""
    for texts in ((chosen, rejected), (rejected, chosen)):
        with pytest.raises(ValueError) as caught:
            split_hh(*texts)
        assert str(caught.value) == reason


HELPFUL = {
    OTHER_PROMPT: [169, 355, 568, 744, 961, 1012, 1167, 1308, 1451],
    BLANK: [121, 741, 1215, 2064],
    "chosen and rejected are identical": [722, 2169],
}
HARMLESS = {OTHER_PROMPT: [1255, 1689, 1951, 1953, 2037], BLANK: [87, 517, 926, 1104]}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published HH files (../shared/data/hh) are not here")
@pytest.mark.parametrize(
    ("name", "kept", "dropped"), [("helpful", 2339, HELPFUL), ("harmless", 2303, HARMLESS)]
)
def test_published(name, kept, dropped):
    """Every record of the published files is split exactly, or dropped, and its line reported."""
    path, report = PUBLISHED / f"{name}-base.test.jsonl.gz", DataReport()
    records = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    for pair in read_preferences(path, report):
        texts = {"chosen": pair.prompt + pair.chosen, "rejected": pair.prompt + pair.rejected}
        assert texts == records[pair.index]
    (file,) = report.files
    assert (file.read, file.kept, file.dropped) == (len(records), kept, dropped)
