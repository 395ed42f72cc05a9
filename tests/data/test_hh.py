"""HH-RLHF's dialogues: split where the last response begins, as published, or refused with the reason."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.data import DataReport, PreferencePair, preferences, read_preferences, split_hh
from record_files import QUESTION

HH = Path(__file__).parents[3] / "shared" / "data" / "hh"
NO_TURN = "no '\\n\\nAssistant:' in a dialogue"
DIFFERENT_PROMPTS = "chosen and rejected differ before the last '\\n\\nAssistant:'"
EMPTY_RESPONSE = "nothing but blanks in a response"
IDENTICAL = "chosen and rejected are identical"
MARKERS = (" Assistant:", "\nAssistant:", " Human:", "\n\nHuman: And 3?")
needs_hh = pytest.mark.skipif(
    not HH.is_dir(), reason="the published HH files (../shared/data/hh) are not here"
)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        (QUESTION + " Yes.\n\nHuman: Sure?\n\nAssistant:", " I am.", " No."),
        # The foil, the longest common prefix, would end the prompt with " I unders".
        (QUESTION, " I understand.", " I understate."),
        (QUESTION + " Well.\n\nAssistant:", " Yes.", " No."),  # two assistant turns in a row
        *((QUESTION, " Yes." + word, " No.") for word in MARKERS),  # inside a response they are text
    ],
)
def test_split(prompt, chosen, rejected):
    """The prompt runs through the last assistant turn, and nothing is lost."""
    assert split_hh(prompt + chosen, prompt + rejected) == PreferencePair(prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (QUESTION + " Yes.", QUESTION.replace("four", "five") + " Yes.", DIFFERENT_PROMPTS),
        (QUESTION + " Yes.", QUESTION + " Er.\n\nHuman: What?\n\nAssistant: No.", DIFFERENT_PROMPTS),
        (QUESTION + " Yes.", QUESTION + " \n", EMPTY_RESPONSE),
        (QUESTION, QUESTION + " No.", EMPTY_RESPONSE),
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


@settings(deadline=None)
@given(st.text(), st.text(), st.text())
def test_any_dialogues(prompt, chosen, rejected):
    """Whatever the texts, a split is exact or refused."""
    texts = prompt + preferences.ASSISTANT + chosen, prompt + preferences.ASSISTANT + rejected
    try:
        pair = split_hh(*texts)
    except ValueError:
        return
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == texts
    assert pair.prompt.endswith(preferences.ASSISTANT)
    assert preferences.ASSISTANT not in pair.chosen + pair.rejected


DROPPED = {
    "helpful-base": {
        DIFFERENT_PROMPTS: [169, 355, 568, 744, 961, 1012, 1167, 1308, 1451],
        EMPTY_RESPONSE: [121, 741, 1215, 2064],
        IDENTICAL: [722, 2169],
    },
    "harmless-base": {
        DIFFERENT_PROMPTS: [1255, 1689, 1951, 1953, 2037],
        EMPTY_RESPONSE: [87, 517, 926, 1104],
    },
}


@needs_hh
@pytest.mark.parametrize(
    ("name", "read", "kept"), [("helpful-base", 2354, 2339), ("harmless-base", 2312, 2303)]
)
def test_published(name, read, kept):
    """The published files are read to the end, and every record is accounted for."""
    path, report = HH / f"{name}.test.jsonl.gz", DataReport()
    pairs = list(read_preferences(path, report))
    (file,) = report.files
    assert (file.read, file.kept, file.dropped) == (read, kept, DROPPED[name])
    assert len(pairs) == kept
    records = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]
    for pair in pairs:
        texts = {"chosen": pair.prompt + pair.chosen, "rejected": pair.prompt + pair.rejected}
        assert texts == records[pair.index]


@needs_hh
def test_published_markers():
    """Markers inside published responses stay text."""
    files = sorted(HH.glob("*-base.test.jsonl.gz"))
    both = [pair for file in files for pair in read_preferences(file)]
    spoken = [p for p in both if any(w in p.chosen + p.rejected for w in ("Human:", "Assistant:"))]
    assert len(spoken) == 58  # pairs whose responses say so
    assert len({p.prompt for p in both}) == len(both) - 2  # two prompts are asked twice
