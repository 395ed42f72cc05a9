"""Every shape of record in every kind of file is read right, and what is left out is counted."""

import json

import pytest

from minidpo import formats
from minidpo.chat import ChatTemplate
from minidpo.data import DataReport, PreferencePair, read_preferences
from record_files import GOOD, QUESTION, write

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
