"""What limits leave of a pair: it fits, it is a piece of the whole, and what is cut or dropped is counted."""

import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characters import BOS, EOS, bpe, ids, pair
from minidpo.data import DataReport, FileReport, PreferencePair, Tokenizer, TokenPair, tokenize_pairs
from minidpo.data import tokenizer as module
from minidpo.errors import UserError

EMPTY, IDENTICAL = "truncation left a response empty", "responses identical as tokens or after truncation"


def test_no_eos_after_a_cut():
    """Each response has the rest of max_length to itself. Cut, it has no EOS; to lose only EOS is a cut."""
    report = DataReport()
    pairs = [pair("ab", "cde", "fghi", 0), pair("ab", "c", "cd", 1), pair("ab", "c", "defghij", 2)]
    both, whole, one = tokenize_pairs(pairs, Tokenizer(bpe(), EOS), max_length=5, report=report)
    assert both == TokenPair(ids("ab"), ids("cde"), ids("fgh"), 0)
    assert whole == TokenPair(ids("ab"), [*ids("c"), EOS], [*ids("cd"), EOS], 1)
    assert one == TokenPair(ids("ab"), [*ids("c"), EOS], ids("def"), 2)
    assert report.truncated_responses == 3


@pytest.mark.parametrize("bos", [False, True])
def test_long_prompt(bos):
    """A long prompt keeps its end and its BOS."""
    report, tokenizer = DataReport(), Tokenizer(bpe(bos=bos), EOS)
    for limit in (1, 2, 4):
        (cut,) = tokenize_pairs([pair("abcdefgh", "i", "j")], tokenizer, 9, limit, report)
        assert cut.prompt == ([BOS, *ids("efgh")[5 - limit :]] if bos else ids("efgh")[4 - limit :])
        assert len(cut.prompt) == limit and cut.chosen == [*ids("i"), EOS]
    assert report.truncated_prompts == 3 and report.truncated_responses == 0


def test_bos_in_the_text():
    """A special token that only the text put first is cut like any other."""
    (cut,) = tokenize_pairs([pair("<s>abcd", "i", "j")], Tokenizer(bpe(), EOS), 9, 2)
    assert cut.prompt == ids("cd")


def test_tokenize_before_cut():
    """Responses are tokenized before the prompt is cut."""
    tokenizer = Tokenizer(bpe(prepend=True), EOS)
    (cut,) = tokenize_pairs([pair("abcd", "e", "f")], tokenizer, 9, 1)
    assert cut == TokenPair(ids("d"), [*ids("e"), EOS], [*ids("f"), EOS], 0)


@pytest.mark.parametrize(
    ("texts", "reason"), [(("abcde", "f", "g"), EMPTY), (("a", "bcde", "bcdf"), IDENTICAL)]
)
def test_nothing_left_to_compare(texts, reason):
    """A pair of which a cut leaves no response, or two equal ones, is dropped and counted."""
    report, pairs = DataReport(), [pair(*texts, 0), pair("a", "f", "g", 1)]
    kept = list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 4, report=report))
    assert [p.index for p in kept] == [1] and report.dropped == {reason: ["0"]}
    kept = list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 4, drop_identical=False))
    assert [p.index for p in kept] == ([0, 1] if reason == IDENTICAL else [1])


def test_without_truncation():
    """Without truncation every pair that fits is kept whole, and no other."""
    report, tokenizer = DataReport(), Tokenizer(bpe(), EOS)
    texts = (("ab", "cd", "cd"), ("ab", "cd", "cde"), ("abcd", "", ""), ("abcdef", "g", "h"))
    pairs = [pair(*each, i) for i, each in enumerate(texts)]
    kept = list(tokenize_pairs(pairs, tokenizer, 5, None, report, truncate=False, drop_identical=False))
    assert kept == [tokenizer.encode_pair(pairs[0]), tokenizer.encode_pair(pairs[2])]
    assert report.dropped == {"longer than max_length": ["1", "3"]} and report.truncated_responses == 0


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ((3, 3), "no pair is left.*dropped 1: longer than max_length"),
        ((9, 0), "= 0 must lie between 1 and max_length = 9"),
        ((9, 10), "= 10 must lie between 1 and max_length = 9"),
    ],
)
def test_limits_that_leave_nothing(limits, said):
    """Limits that contradict each other, or leave no pair, are refused with the reasons."""
    with pytest.raises(UserError, match=said):
        list(tokenize_pairs([pair("abc", "d", "e")], Tokenizer(bpe(), EOS), *limits, truncate=False))


text = st.text(alphabet="abcdefghij ", max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(text, text, text), min_size=1, max_size=4),
    st.integers(2, 12),
    st.booleans(),
    st.booleans(),
)
def test_any_cut(texts, max_length, bos, prepend):
    """What is kept always fits, and is a piece of the whole."""
    tokenizer = Tokenizer(bpe([("b", "c"), ("a", "b"), (" ", "a")], bos, prepend), EOS)
    pairs, report = [pair(*t, i) for i, t in enumerate(texts)], DataReport()
    try:
        kept = list(tokenize_pairs(pairs, tokenizer, max_length, max(1, max_length // 2), report))
    except UserError:
        kept = []
    assert report.tokenized == len(pairs) and report.kept == len(kept)
    for cut in kept:
        whole = tokenizer.encode_pair(pairs[cut.index])
        assert 1 <= len(cut.prompt) <= max(1, max_length // 2)
        for part, full in ((cut.chosen, whole.chosen), (cut.rejected, whole.rejected)):
            assert part and part == full[: len(part)]
            assert part == full or (len(cut.prompt) + len(part) == max_length and EOS not in part)


def test_report_of_tokens():
    """The report counts tokens before and after the cut."""
    report = DataReport()
    list(tokenize_pairs([pair("abcd", "e", "fghij")], Tokenizer(bpe(), EOS), 5, 2, report))
    assert list(report.lines()) == [
        "tokenized 1 pairs, 1 kept, with 1 different prompts",
        "  truncated 1 prompts and 1 responses (max_length 5, max_prompt_length 2)",
        "  prompt tokens before any cut: median 4, longest 4",
        "  chosen tokens before any cut: median 2, longest 2",
        "  rejected tokens before any cut: median 6, longest 6",
        "  responses are 71% of the 7 tokens kept",
    ]


def test_chunks(monkeypatch):
    """Pairs come out in order, and no more than one chunk of text is in memory."""
    alive, most, tokenizer = weakref.WeakSet(), 0, Tokenizer(bpe(), EOS)
    monkeypatch.setattr(module, "_CHUNK", 4)

    def texts():
        nonlocal most
        for i in range(38):
            yield (text := pair(f"a{'b' * i}", "c", "d", i))
            alive.add(text)
            del text
            most = max(most, len(alive))

    assert [len(ids.prompt) for ids in tokenize_pairs(texts(), tokenizer, 50)] == [*range(1, 39)]
    assert 1 <= most <= 2 * 4


def test_mixed_special_tokens():
    """Pairs of several kinds of text keep their order, and each gets the special tokens that it lacks."""
    tokenizer = Tokenizer(bpe(bos=True), EOS)
    plain, written = pair("a", "b", "c", 0), PreferencePair("<s>a", "b", "c", 1, add_special_tokens=False)
    encoded = tokenizer.encode_pairs([plain, written, plain])
    assert [p.prompt for p in encoded] == [[BOS, *ids("a")]] * 3
    assert [p.index for p in encoded] == [0, 1, 0]


def test_dropped_record_and_its_file():
    """A dropped record is named with its file."""
    report = DataReport([FileReport("x/a.jsonl", "text", 1), FileReport("x/b.jsonl", "text", 4)])
    pairs = [PreferencePair("a", "b", "c", 0), PreferencePair("a", "bcd", "bce", 3, file=1)]
    assert len(list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 3, report=report))) == 1
    assert f"  dropped 1: {IDENTICAL} (record b.jsonl:3)" in report.lines()
