"""What reading preference files promises: a record is read right, counted, or refused in one line."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import formats
from minidpo.chat import ChatTemplate
from minidpo.data import DataReport, PreferencePair, read_preferences, split_by_prompt, split_hh
from minidpo.errors import UserError

HH = Path(__file__).parents[2] / "shared" / "data" / "hh"
needs_hh = pytest.mark.skipif(
    not HH.is_dir(), reason="the published HH files (../shared/data/hh) are not here"
)

QUESTION = "\n\nHuman: Is 2 + 2 four?\n\nAssistant:"
GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}


def write(path: Path, *records: dict | str) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    text = "\n".join(lines).encode() + b"\n"
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


# Splitting HH dialogues


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


# Real files


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


# Reading files


TALK = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
]
YES, NO = ({"role": "assistant", "content": text} for text in ("y", "n"))
HH_TEXT = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
HH_TEMPLATE = ChatTemplate("hh", None, "</s>")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
@pytest.mark.parametrize(
    ("record", "shape", "pair"),
    [
        ({**GOOD, "source": 2}, formats.PROMPT_AND_ENDINGS, PreferencePair("p", "c", "r")),
        (
            {"chosen": QUESTION + " Yes.", "rejected": QUESTION + " No."},
            formats.HH_DIALOGUES,
            PreferencePair(QUESTION, " Yes.", " No."),
        ),
        (
            {"prompt": TALK, "chosen": [YES], "rejected": [NO]},
            formats.MESSAGES,
            PreferencePair(HH_TEXT, " y", " n"),
        ),
        (
            {"prompt": "q", "chosen": [*TALK, YES], "rejected": [*TALK, NO]},  # as UltraFeedback is published
            formats.CONVERSATIONS,
            PreferencePair(HH_TEXT, " y", " n"),
        ),
    ],
)
def test_every_format_is_recognised_from_the_first_record_in_every_kind_of_file(
    tmp_path, name, record, shape, pair
):
    report = DataReport()
    path = write(tmp_path / name, record)
    if ".json" in name and "l" not in name:
        path = write(tmp_path / name, json.dumps([record], indent=1))
    assert list(read_preferences(path, report, template=HH_TEMPLATE)) == [pair]
    assert report.files[0].format == shape
    assert f"{path}: {shape}: 1 records read, 1 kept" in report.lines()


def test_a_list_is_read_like_lines_and_each_record_has_the_line_it_begins_on(tmp_path):
    path, report = tmp_path / "a.json", DataReport()
    records = [GOOD, {**GOOD, "chosen": " "}, {**GOOD, "prompt": "q\n\u2028"}]
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(records, indent=1, ensure_ascii=False).encode())
    assert [(p.prompt, p.index) for p in read_preferences(path, report)] == [("p", 0), ("q\n\u2028", 2)]
    assert report.files[0].dropped == {formats.EMPTY_ENDING: [7]}
    path.write_text("\n".join(map(json.dumps, records)))  # lines under the name of a list
    assert [p.index for p in read_preferences(path)] == [0, 2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([*TALK, YES], [*TALK[:2], NO], formats.NOT_ONE_TURN),  # the turns differ before the last
        ([*TALK, YES], [*TALK, YES, TALK[0], NO], formats.NOT_ONE_TURN),
        ([*TALK, YES], [*TALK], formats.NOT_ONE_TURN),
        ([TALK[0]], [TALK[2]], formats.NO_PROMPT),
        ([YES], [NO], formats.NO_PROMPT),
        ([], [*TALK, NO], formats.NO_PROMPT),
        ([TALK[1], TALK[0]], [TALK[1], NO], formats.NOT_ONE_TURN),  # a user turn is no ending
        ([*TALK, YES], [*TALK, {**NO, "content": " \n"}], formats.EMPTY_ENDING),
        ([*TALK, YES], [*TALK, YES], formats.IDENTICAL),
    ],
)
def test_conversations_that_are_no_pair_are_dropped_and_counted(tmp_path, chosen, rejected, reason):
    good = {"chosen": [*TALK, YES], "rejected": [*TALK, NO]}
    path = write(tmp_path / "a.jsonl", good, {"chosen": chosen, "rejected": rejected})
    report = DataReport()
    assert [p.index for p in read_preferences(path, report, template=HH_TEMPLATE)] == [0]
    assert report.files[0].dropped == {reason: [2]}


def test_the_prompt_of_conversations_is_all_the_turns_they_share_though_their_other_keys_differ(tmp_path):
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
        ({"score_chosen": 9}, None),
        ({"margin": "much better"}, None),
        ({"margin": True}, None),
        ({"margin": float("nan")}, None),
        ({"margin": 10**400}, None),
        ({}, None),
    ],
)
def test_a_margin_is_a_finite_number_or_the_difference_of_two_scores(tmp_path, keys, margin):
    (pair,) = read_preferences(write(tmp_path / "a.jsonl", GOOD | keys))
    assert pair.margin == margin


def test_a_byte_order_mark_crlf_and_blank_lines_change_nothing_but_line_numbers(tmp_path):
    path, report = tmp_path / "a.jsonl", DataReport()
    broken = {**GOOD, "chosen": " "}
    lines = ["", json.dumps(GOOD), "   ", json.dumps(broken), "", json.dumps({**GOOD, "prompt": "q"})]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    pairs = list(read_preferences(path, report))
    assert [(pair.prompt, pair.index) for pair in pairs] == [("p", 0), ("q", 2)]
    assert report.files[0].dropped == {formats.EMPTY_ENDING: [4]}


def test_a_gzip_file_is_known_by_its_content(tmp_path):
    packed = write(tmp_path / "a.jsonl.gz", GOOD)
    unpacked = write(tmp_path / "a.jsonl", GOOD)
    packed.rename(tmp_path / "b.jsonl")
    unpacked.rename(tmp_path / "b.jsonl.gz")
    for name in ("b.jsonl", "b.jsonl.gz"):
        assert list(read_preferences(tmp_path / name)) == [PreferencePair("p", "c", "r")]


def test_unicode_line_breaks_inside_a_text_do_not_break_the_line(tmp_path):
    text = "one\u2028two\u0085three \U0001f600 \x00"
    path = write(tmp_path / "a.jsonl", json.dumps({**GOOD, "chosen": text}, ensure_ascii=False))
    assert next(read_preferences(path)).chosen == text


def test_identical_endings_are_dropped_unless_asked_for(tmp_path):
    path, report = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "chosen": "r"}), DataReport()
    assert [pair.index for pair in read_preferences(path, report)] == [0]
    assert report.files[0].dropped == {formats.IDENTICAL: [2]}
    assert [pair.index for pair in read_preferences(path, drop_identical=False)] == [0, 1]


def test_the_report_says_what_was_read_kept_and_dropped_with_the_first_lines(tmp_path):
    blank = {**GOOD, "rejected": "\n"}
    path, report = write(tmp_path / "a.jsonl", GOOD, *[blank] * 7), DataReport()
    list(read_preferences(path, report))
    assert list(report.lines()) == [
        f"{path}: prompt, chosen, rejected: 8 records read, 1 kept",
        "  dropped 7: nothing but blanks in an ending (line 2, 3, 4, 5, 6, ...)",
    ]


# Holding out by prompt


PROMPTS = [f"question {i % 70}" for i in range(100)]  # 30 prompts have two pairs


def test_no_prompt_is_on_both_sides_of_the_split():
    held_out = split_by_prompt(PROMPTS, 25, seed=1)
    inside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if out}
    outside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if not out}
    assert sum(held_out) == 25 and not inside & outside


def test_the_split_is_a_function_of_the_seed_and_not_of_file_order():
    held_out = dict(zip(PROMPTS, split_by_prompt(PROMPTS, 25, seed=1), strict=True))
    backwards = dict(zip(PROMPTS[::-1], split_by_prompt(PROMPTS[::-1], 25, seed=1), strict=True))
    assert held_out == backwards
    assert held_out != dict(zip(PROMPTS, split_by_prompt(PROMPTS, 25, seed=2), strict=True))


def test_the_split_takes_text_and_bytes_alike():
    assert split_by_prompt([p.encode() for p in PROMPTS], 25, 1) == split_by_prompt(PROMPTS, 25, 1)


def test_a_split_that_leaves_a_side_empty_is_refused():
    assert split_by_prompt(PROMPTS, 0, seed=1) == [False] * 100
    for impossible in (-1, 100, 101):
        with pytest.raises(UserError, match=f"{impossible} pairs to hold out of 100"):
            split_by_prompt(PROMPTS, impossible, seed=1)
    with pytest.raises(UserError, match="none can be held out"):
        split_by_prompt(["same"] * 10, 5, seed=1)
