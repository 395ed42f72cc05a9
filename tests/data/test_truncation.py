"""What limits leave of a pair: it fits, it is a piece of the whole, and what is cut or dropped is counted."""

import weakref

import pytest

from characters import BOS, EOS, bpe, ids, pair
from minidpo.data import DataReport, FileReport, PreferencePair, Tokenizer, TokenPair, tokenize_pairs
from minidpo.errors import UserError

EMPTY, IDENTICAL = "truncation left a response empty", "responses identical as tokens or after truncation"


@pytest.mark.parametrize(
    ("texts", "left", "cuts"),
    [  # max_length 5: a prompt of 2 tokens leaves 3 to each response, EOS included.
        (("ab", "cde", "fghi"), (ids("ab"), ids("cde"), ids("fgh")), 2),  # To lose only EOS is a cut, too.
        (("ab", "c", "cd"), (ids("ab"), [*ids("c"), EOS], [*ids("cd"), EOS]), 0),
        (("ab", "c", "defghij"), (ids("ab"), [*ids("c"), EOS], ids("def")), 1),
        # max_prompt_length 3: the prompt loses its beginning, and 2 tokens are left to each response.
        (("abcdef", "g", "hij"), (ids("def"), [*ids("g"), EOS], ids("hi")), 1),
    ],
)
def test_cut(texts, left, cuts):
    """Each response has the rest of max_length to itself, and no EOS after a cut."""
    report = DataReport()
    kept = list(tokenize_pairs([pair(*texts)], Tokenizer(bpe(), EOS), 5, 3, report))
    assert kept == [TokenPair(*left, 0)] and report.truncated_responses == cuts


@pytest.mark.parametrize(
    ("bos", "prompt", "limit", "left"),
    [
        (False, "abcdefgh", 4, ids("efgh")),
        (True, "abcdefgh", 4, [BOS, *ids("fgh")]),
        (True, "abcdefgh", 1, [BOS]),
        (False, "<s>abcd", 2, ids("cd")),  # BOS that only the text has is cut like any other token.
    ],
)
def test_long_prompt(bos, prompt, limit, left):
    """A long prompt keeps its end, and the BOS of its tokenizer."""
    report, tokenizer = DataReport(), Tokenizer(bpe(bos=bos), EOS)
    (cut,) = tokenize_pairs([pair(prompt, "i", "j")], tokenizer, 9, limit, report)
    assert cut == TokenPair(left, [*ids("i"), EOS], [*ids("j"), EOS], 0) and report.truncated_prompts == 1


def test_space_after_a_cut():
    """Responses are tokenized before the prompt is cut, so none gets the space of a text's beginning."""
    (cut,) = tokenize_pairs([pair("abcd", "e", "f")], Tokenizer(bpe(prepend=True), EOS), 9, 1)
    assert cut == TokenPair(ids("d"), [*ids("e"), EOS], [*ids("f"), EOS], 0)


@pytest.mark.parametrize(
    ("texts", "options", "reason"),
    [
        (("", "f", "g"), {}, "the prompt has no token, so nothing predicts the first token of a response"),
        (("abcde", "f", "g"), {}, EMPTY),
        (("a", "bcde", "bcdf"), {}, IDENTICAL),
        (("a", "bcde", "bcdf"), {"drop_identical": False}, None),
        (("a", "bc", "bcd"), {"truncate": False}, "longer than max_length"),  # a, b, c, d, EOS
        (("a", "bc", "b"), {"truncate": False}, None),
    ],
)
def test_dropped(texts, options, reason):
    """A pair of which the limits leave nothing to compare is dropped, and counted by file and record."""
    files = [FileReport("x/a.jsonl", "text", 1), FileReport("x/b.jsonl", "text", 4)]
    report, pairs = DataReport(files), [PreferencePair(*texts, 3, file=1), pair("a", "f", "g", 0)]
    kept = list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 4, report=report, **options))
    assert [p.index for p in kept] == ([0] if reason else [3, 0])
    assert report.dropped == ({reason: ["b.jsonl:3"]} if reason else {})


@pytest.mark.parametrize(
    ("max_length", "max_prompt_length", "said"),
    [
        (3, 3, "no pair is left to use with max_length = 3 .dropped 1: truncation left a response empty"),
        (9, 0, "max_prompt_length = 0 must lie between 1 and max_length = 9"),
        (9, 10, "max_prompt_length = 10 must lie between 1 and max_length = 9"),
    ],
)
def test_limits(max_length, max_prompt_length, said):
    """Limits that contradict each other, or leave no pair, are refused with the reasons."""
    with pytest.raises(UserError, match=said):
        list(tokenize_pairs([pair("abc", "d", "e")], Tokenizer(bpe(), EOS), max_length, max_prompt_length))


def test_report():
    """The report counts tokens before and after the cut."""
    report, tokenizer = DataReport(), Tokenizer(bpe(), EOS)
    list(tokenize_pairs([pair("abcd", "e", "fghij"), pair("cd", "e", "f")], tokenizer, 5, 2, report))
    assert list(report.lines()) == [
        "tokenized 2 pairs, 2 kept, with 1 different prompts",  # Both are "cd" now.
        "  truncated 1 prompts and 1 responses (max_length 5, max_prompt_length 2)",
        "  prompt tokens before any cut: median 3, 95 % at most 4, longest 4",
        "  chosen tokens before any cut: median 2, 95 % at most 2, longest 2",
        "  rejected tokens before any cut: median 4, 95 % at most 6, longest 6",
        "  responses are 69% of the 13 tokens kept",  # (2 + 3) + (2 + 2) of 7 + 6
    ]


def test_memory():
    """Pairs come out in order, and only a part of the texts is in memory."""
    alive, counts = weakref.WeakSet(), []

    def texts():
        for i in range(2000):
            text = pair("a", "b", "c", i)
            alive.add(text)
            yield text
            counts.append(len(alive))

    kept = tokenize_pairs(texts(), Tokenizer(bpe(), EOS), 50)
    assert [p.index for p in kept] == list(range(2000)) and max(counts) < 1000
