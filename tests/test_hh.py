"""HH-RLHF's dialogues: split where the last answer begins, as published, or refused with the reason."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo import formats
from minidpo.data import DataReport, PreferencePair, read_preferences, split_hh
from record_files import QUESTION

HH = Path(__file__).parents[2] / "shared" / "data" / "hh"
needs_hh = pytest.mark.skipif(
    not HH.is_dir(), reason="the published HH files (../shared/data/hh) are not here"
)


def test_prompt_runs_through_the_last_assistant_turn_and_nothing_is_lost():
    first = QUESTION + " Yes.\n\nHuman: Sure?\n\nAssistant:"
    pair = split_hh(first + " I am.", first + " No.")
    assert pair == PreferencePair(first, " I am.", " No.")


def test_replies_that_begin_alike_leave_no_half_word_in_the_prompt():
    # The foil, the longest common prefix, would end the prompt with " I unders".
    pair = split_hh(QUESTION + " I understand.", QUESTION + " I understate.")
    assert pair == PreferencePair(QUESTION, " I understand.", " I understate.")


@pytest.mark.parametrize("word", [" Assistant:", "\nAssistant:", " Human:", "\n\nHuman: And 3?"])
def test_a_marker_inside_a_reply_is_text(word):
    pair = split_hh(QUESTION + " Yes." + word, QUESTION + " No.")
    assert pair == PreferencePair(QUESTION, " Yes." + word, " No.")


def test_two_assistant_turns_in_a_row_split_at_the_second():
    twice = QUESTION + " Well.\n\nAssistant:"
    assert split_hh(twice + " Yes.", twice + " No.") == PreferencePair(twice, " Yes.", " No.")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (QUESTION + " Yes.", QUESTION.replace("four", "five") + " Yes.", formats.DIFFERENT_PROMPTS),
        (QUESTION + " Yes.", QUESTION + " Er.\n\nHuman: What?\n\nAssistant: No.", formats.DIFFERENT_PROMPTS),
        (QUESTION + " Yes.", QUESTION + " \n", formats.EMPTY_ENDING),
        (QUESTION, QUESTION + " No.", formats.EMPTY_ENDING),
        ("Is 2 + 2 four? Yes.", QUESTION + " No.", formats.NO_TURN),
        ("", "", formats.NO_TURN),
    ],
)
def test_dialogues_that_are_no_pair_are_refused(chosen, rejected, reason):
    for texts in ((chosen, rejected), (rejected, chosen)):
        with pytest.raises(ValueError) as caught:
            split_hh(*texts)
        assert str(caught.value) == reason


@settings(deadline=None)
@given(st.text(), st.text(), st.text())
def test_a_split_is_exact_or_refused(prompt, chosen, rejected):
    texts = prompt + formats.ASSISTANT + chosen, prompt + formats.ASSISTANT + rejected
    try:
        pair = split_hh(*texts)
    except ValueError:
        return
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == texts
    assert pair.prompt.endswith(formats.ASSISTANT)
    assert formats.ASSISTANT not in pair.chosen + pair.rejected


@needs_hh
@pytest.mark.parametrize(
    ("name", "read", "kept", "lines"),
    [
        (
            "helpful-base",
            2354,
            2339,
            {
                formats.DIFFERENT_PROMPTS: [169, 355, 568, 744, 961, 1012, 1167, 1308, 1451],
                formats.EMPTY_ENDING: [121, 741, 1215, 2064],
                formats.IDENTICAL: [722, 2169],
            },
        ),
        (
            "harmless-base",
            2312,
            2303,
            {
                formats.DIFFERENT_PROMPTS: [1255, 1689, 1951, 1953, 2037],
                formats.EMPTY_ENDING: [87, 517, 926, 1104],
            },
        ),
    ],
)
def test_the_published_hh_files_are_read_to_the_end_and_every_record_is_accounted_for(
    name, read, kept, lines
):
    path, report = HH / f"{name}.test.jsonl.gz", DataReport()
    pairs = list(read_preferences(path, report))
    (file,) = report.files
    assert (file.read, file.kept, dict(file.dropped)) == (read, kept, lines)
    assert len(pairs) == kept
    with gzip.open(path, "rt", encoding="utf-8") as published:
        records = [json.loads(line) for line in published]
    for pair in pairs:
        record = records[pair.index]
        assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (
            record["chosen"],
            record["rejected"],
        )


@needs_hh
def test_published_markers_inside_replies_stay_text():
    both = [
        p
        for name in ("helpful-base", "harmless-base")
        for p in read_preferences(HH / f"{name}.test.jsonl.gz")
    ]
    spoken = [p for p in both if any(w in p.chosen + p.rejected for w in ("Human:", "Assistant:"))]
    assert len(spoken) == 58  # pairs whose endings say so
    assert len({p.prompt for p in both}) == len(both) - 2  # two prompts are asked twice
