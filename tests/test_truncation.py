"""What limits leave of a pair: it always fits, it is a piece of the whole, and what is cut or dropped is counted."""

import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from characters import BOS, EOS, bpe, ids, pair
from minidpo import tokenizer as module
from minidpo.data import DataReport, FileReport, PreferencePair
from minidpo.errors import UserError
from minidpo.tokenizer import Tokenizer, TokenPair, tokenize_pairs


def test_a_cut_ending_has_no_eos_and_losing_only_its_eos_counts_as_a_cut():
    report = DataReport()
    pairs = [pair("ab", "cde", "fghi", 0), pair("ab", "c", "cd", 1)]
    cut, whole = tokenize_pairs(pairs, Tokenizer(bpe(), EOS), max_length=5, report=report)
    assert cut == TokenPair(ids("ab"), ids("cde"), ids("fgh"), 0)
    assert report.truncated_endings == 2
    assert whole == TokenPair(ids("ab"), [*ids("c"), EOS], [*ids("cd"), EOS], 1)


def test_each_ending_has_the_rest_of_max_length_to_itself():
    report = DataReport()
    (cut,) = tokenize_pairs([pair("ab", "c", "defghij")], Tokenizer(bpe(), EOS), 5, report=report)
    assert cut == TokenPair(ids("ab"), [*ids("c"), EOS], ids("def"), 0)
    assert report.truncated_endings == 1


@pytest.mark.parametrize("bos", [False, True])
def test_a_long_prompt_keeps_its_end_and_its_bos(bos):
    report, tokenizer = DataReport(), Tokenizer(bpe(bos=bos), EOS)
    for limit in (1, 2, 4):
        (cut,) = tokenize_pairs([pair("abcdefgh", "i", "j")], tokenizer, 9, limit, report)
        assert cut.prompt == ([BOS, *ids("efgh")[5 - limit :]] if bos else ids("efgh")[4 - limit :])
        assert len(cut.prompt) == limit and cut.chosen == [*ids("i"), EOS]
    assert report.truncated_prompts == 3 and report.truncated_endings == 0


def test_a_special_token_that_only_the_text_put_first_is_cut_like_any_other():
    (cut,) = tokenize_pairs([pair("<s>abcd", "i", "j")], Tokenizer(bpe(), EOS), 9, 2)
    assert cut.prompt == ids("cd")


def test_endings_are_tokenized_before_the_prompt_is_cut():
    tokenizer = Tokenizer(bpe(prepend=True), EOS)
    (cut,) = tokenize_pairs([pair("abcd", "e", "f")], tokenizer, 9, 1)
    assert cut == TokenPair(ids("d"), [*ids("e"), EOS], [*ids("f"), EOS], 0)


def test_a_prompt_that_leaves_an_ending_no_room_is_dropped_and_counted():
    report = DataReport()
    pairs = [pair("abcde", "f", "g", 0), pair("a", "f", "g", 1)]
    kept = list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 4, report=report))
    assert [p.index for p in kept] == [1] and report.dropped == {module.EMPTY_AFTER_CUT: [(0, 0)]}


def test_endings_that_a_cut_makes_equal_are_dropped_unless_asked_for():
    report, tokenizer = DataReport(), Tokenizer(bpe(), EOS)
    pairs = [pair("a", "bcd", "bce", 0), pair("a", "b", "c", 1)]
    assert [p.index for p in tokenize_pairs(pairs, tokenizer, 3, report=report)] == [1]
    assert report.dropped == {module.IDENTICAL_AFTER_CUT: [(0, 0)]}
    assert len(list(tokenize_pairs(pairs, tokenizer, 3, drop_identical=False))) == 2


def test_without_truncation_every_pair_that_fits_is_kept_whole_and_no_other():
    report, tokenizer = DataReport(), Tokenizer(bpe(), EOS)
    pairs = [
        pair("ab", "cd", "cd", 0),
        pair("ab", "cd", "cde", 1),
        pair("abcd", "", "", 2),
        pair("abcdef", "g", "h", 3),
    ]
    kept = list(tokenize_pairs(pairs, tokenizer, 5, None, report, truncate=False, drop_identical=False))
    assert kept == [tokenizer.encode_pair(pairs[0]), tokenizer.encode_pair(pairs[2])]
    assert report.dropped == {module.TOO_LONG: [(0, 1), (0, 3)]} and report.truncated_endings == 0


def test_no_pair_left_is_refused_with_the_reasons():
    with pytest.raises(UserError, match="no pair is left.*dropped 1: longer than max_length"):
        list(tokenize_pairs([pair("abc", "d", "e")], Tokenizer(bpe(), EOS), 3, truncate=False))


def test_limits_that_contradict_each_other_are_refused():
    for limit in (0, 10):
        with pytest.raises(
            UserError, match=f"max_prompt_length = {limit} must lie between 1 and max_length = 9"
        ):
            list(tokenize_pairs([pair("a", "b", "c")], Tokenizer(bpe(), EOS), 9, limit))


text = st.text(alphabet="abcdefghij ", max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(text, text, text), min_size=1, max_size=4),
    st.integers(2, 12),
    st.booleans(),
    st.booleans(),
)
def test_what_is_kept_always_fits_and_is_a_piece_of_the_whole(texts, max_length, bos, prepend):
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


def test_the_report_counts_tokens_before_and_after_the_cut():
    report = DataReport()
    list(tokenize_pairs([pair("abcd", "e", "fghij")], Tokenizer(bpe(), EOS), 5, 2, report))
    assert list(report.lines()) == [
        "tokenized 1 pairs, 1 kept, with 1 different prompts",
        "  truncated 1 prompts and 1 endings (max_length 5, max_prompt_length 2)",
        "  prompt tokens before any cut: median 4, 5th to 95th percentile 4 to 4, longest 4",
        "  chosen tokens before any cut: median 2, 5th to 95th percentile 2 to 2, longest 2",
        "  rejected tokens before any cut: median 6, 5th to 95th percentile 6 to 6, longest 6",
        "  endings are 71% of the 7 tokens kept",
    ]


def test_pairs_come_out_in_order_whatever_the_chunk(monkeypatch):
    tokenizer, pairs = Tokenizer(bpe(), EOS), [pair("a", "b" * (i % 5 + 1), "c", i) for i in range(23)]
    monkeypatch.setattr(module, "_CHUNK", 4)
    assert list(tokenize_pairs(iter(pairs), tokenizer, 50)) == [tokenizer.encode_pair(p) for p in pairs]


def test_no_more_than_one_chunk_of_text_is_in_memory(monkeypatch):
    alive, most = weakref.WeakSet(), 0
    monkeypatch.setattr(module, "_CHUNK", 4)

    def texts():
        nonlocal most
        for i in range(40):
            yield (text := pair(f"a{'b' * i}", "c", "d", i))
            alive.add(text)
            del text
            most = max(most, len(alive))

    assert len(list(tokenize_pairs(texts(), Tokenizer(bpe(), EOS), 50))) == 40
    assert 1 <= most <= 2 * 4


def test_pairs_of_several_kinds_of_text_keep_their_order_and_each_gets_the_special_tokens_it_lacks():
    tokenizer = Tokenizer(bpe(bos=True), EOS)
    plain, written = pair("a", "b", "c", 0), PreferencePair("<s>a", "b", "c", 1, add_special_tokens=False)
    encoded = tokenizer.encode_pairs([plain, written, plain])
    assert [p.prompt for p in encoded] == [[BOS, *ids("a")]] * 3
    assert [p.index for p in encoded] == [0, 1, 0]


def test_of_several_files_a_dropped_record_is_named_with_its_file():
    report = DataReport([FileReport("x/a.jsonl", "text", 1), FileReport("x/b.jsonl", "text", 4)])
    pairs = [PreferencePair("a", "b", "c", 0), PreferencePair("a", "bcd", "bce", 3, file=1)]
    assert len(list(tokenize_pairs(pairs, Tokenizer(bpe(), EOS), 3, report=report))) == 1
    assert list(report.dropped_lines()) == [f"dropped 1: {module.IDENTICAL_AFTER_CUT} (record b.jsonl:3)"]
