"""HH-RLHF's dialogues: split where the last response begins, as published, or refused with the reason."""

import gzip
import json
from pathlib import Path

import pytest

from minidpo.data import DataReport, PreferencePair, read_preferences, split_hh
from record_files import QUESTION

HH = Path(__file__).parents[3] / "shared" / "data" / "hh"
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
def test_refused(chosen, rejected, reason):
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


@pytest.mark.skipif(not HH.is_dir(), reason="the published HH files (../shared/data/hh) are not here")
@pytest.mark.parametrize(
    ("name", "kept", "dropped"), [("helpful", 2339, HELPFUL), ("harmless", 2303, HARMLESS)]
)
def test_published(name, kept, dropped):
    """Every record of the published files is split exactly, or dropped, and its line reported."""
    path, report = HH / f"{name}-base.test.jsonl.gz", DataReport()
    records = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    for pair in read_preferences(path, report):
        texts = {"chosen": pair.prompt + pair.chosen, "rejected": pair.prompt + pair.rejected}
        assert texts == records[pair.index]
    (file,) = report.files
    assert (file.read, file.kept, file.dropped) == (len(records), kept, dropped)
