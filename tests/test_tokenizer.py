"""What tokenizing a pair promises: the endings that were meant are scored, whole or honestly cut."""

import json
import weakref
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from minidpo import tokenizer as module
from minidpo.data import DataReport, FileReport, PreferencePair
from minidpo.errors import UserError
from minidpo.tokenizer import Tokenizer, TokenPair, describe_pair, tokenize_pairs

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not here")

EOS, BOS = 0, 1
LETTERS = "abcdefghij ▁"


def bpe(merges: list[tuple[str, str]] = (), bos: bool = False, prepend: bool = False) -> tokenizers.Tokenizer:
    """A character tokenizer with the given merges, to be made as awkward as a test needs."""
    vocab = {"</s>": EOS, "<s>": BOS}
    for token in [*LETTERS, *(left + right for left, right in merges)]:
        vocab[token] = len(vocab)
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    core.add_special_tokens(["</s>", "<s>"])
    if prepend:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return core


def ids(text: str) -> list[int]:
    return [2 + LETTERS.index(letter) for letter in text]


def pair(prompt: str, chosen: str, rejected: str, index: int = 0) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, index)


# The boundary rule


def test_prompt_ids_are_those_of_the_prompt_alone_even_where_the_tokenizer_merges_across_the_boundary():
    tokenizer = Tokenizer(bpe([("b", "c")]), EOS)
    merged = tokenizer.encode("abcd")
    assert merged[:2] != tokenizer.encode("ab"), "the tokenizer must merge here, or this proves nothing"
    encoded = tokenizer.encode_pair(pair("ab", "cd", "de"))
    assert encoded == TokenPair(ids("ab"), [*ids("cd"), EOS], [*ids("de"), EOS], 0)


def test_both_endings_share_one_prompt_when_only_one_of_them_merges():
    tokenizer = Tokenizer(bpe([("b", "c")], bos=True), EOS)
    encoded = tokenizer.encode_pair(pair("ab", "cc", "dd"))
    assert encoded == TokenPair([BOS, *ids("ab")], [*ids("cc"), EOS], [*ids("dd"), EOS], 0)


def test_a_tokenizer_that_prepends_a_space_puts_none_before_an_ending():
    tokenizer = Tokenizer(bpe(bos=True, prepend=True), EOS)
    assert tokenizer.encode("cd", add_special_tokens=False) == ids("▁cd")  # the foil: the ending alone
    encoded = tokenizer.encode_pair(pair("ab", "cd", " d"))
    assert encoded == TokenPair([BOS, *ids("▁ab")], [*ids("cd"), EOS], [*ids("▁d"), EOS], 0)


def test_where_a_merge_forces_the_ending_to_stand_alone_no_second_bos_is_added():
    tokenizer = Tokenizer(bpe([("b", "c")], bos=True), EOS)
    assert BOS not in tokenizer.encode_pair(pair("b", "c", "cd")).chosen


def test_a_prompt_without_a_token_is_refused_and_in_a_stream_counted():
    # With nothing before it, the first token of an ending would be predicted by another pair's last.
    tokenizer, report = Tokenizer(bpe(), EOS), DataReport()
    with pytest.raises(ValueError, match="nothing predicts"):
        tokenizer.encode_pair(pair("", "a", "b"))
    kept = list(tokenize_pairs([pair("", "a", "b", 0), pair("a", "b", "c", 1)], tokenizer, 9, report=report))
    assert [p.index for p in kept] == [1] and report.dropped == {module.NO_PROMPT_TOKEN: [(0, 0)]}
    assert Tokenizer(bpe(bos=True), EOS).encode_pair(pair("", "a", "b")).prompt == [BOS]


# EOS and cuts


def test_eos_is_appended_once():
    encoded = Tokenizer(bpe(), EOS).encode_pair(pair("a", "bc", "de</s>"))
    assert encoded.chosen == [*ids("bc"), EOS] and encoded.rejected == [*ids("de"), EOS]


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
        "  truncated 1 prompts and 1 endings",
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


# Every token of one pair


def test_rejected_positions_restart_where_the_prompt_ended_and_only_endings_are_scored():
    tokenizer = Tokenizer(bpe(), EOS)
    rows = describe_pair(tokenizer.encode_pair(pair("ab", "cd", "e")), tokenizer)
    assert [(row.role, row.position, row.piece, row.scored) for row in rows] == [
        ("prompt", 0, "a", False),
        ("prompt", 1, "b", False),
        ("chosen", 2, "c", True),
        ("chosen", 3, "d", True),
        ("eos", 4, "</s>", True),
        ("rejected", 2, "e", True),
        ("eos", 3, "</s>", True),
    ]


def test_eos_inside_a_text_is_no_end():
    tokenizer = Tokenizer(bpe(), EOS)
    rows = describe_pair(tokenizer.encode_pair(pair("a</s>", "</s>b", "c")), tokenizer)
    assert [row.role for row in rows] == ["prompt", "prompt", "chosen", "chosen", "eos", "rejected", "eos"]


# Loading


def directory(path: Path, **files: dict) -> Path:
    bpe(bos=True).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 5}},
        {"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}},
        {"special_tokens_map": {"eos_token": {"content": "</s>"}}, "config": {"eos_token_id": 5}},
        {"config": {"eos_token_id": EOS}},
        {"config": {"eos_token_id": [EOS, 5]}},
    ],
)
def test_eos_is_found_in_the_first_file_that_names_it(tmp_path, files):
    tokenizer = Tokenizer.from_directory(directory(tmp_path, **files))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (EOS, BOS, 2 + len(LETTERS))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "tokenizer_config.json: no eos_token"),
        ({"config": {"eos_token_id": []}}, "config.json: eos_token_id"),
        ({"tokenizer_config": {"eos_token": "<end>"}}, "tokenizer_config.json: eos_token '<end>' is not in"),
        ({"special_tokens_map": {"eos_token": {"text": "</s>"}}}, "tokenizer_config.json: no eos_token"),
        ({"config": {"eos_token_id": 99}}, "config.json: eos_token_id 99 is not in"),
        ({"tokenizer_config": ["</s>"]}, "tokenizer_config.json: a JSON list"),
    ],
)
def test_a_tokenizer_without_eos_is_refused_by_file_and_key(tmp_path, files, said):
    with pytest.raises(UserError) as caught:
        Tokenizer.from_directory(directory(tmp_path, **files))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0",\n "model": ')
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer[^\n]*fetch it again$"):
        Tokenizer.from_directory(tmp_path)
    directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not JSON"):
        Tokenizer.from_directory(tmp_path)


def test_truncation_and_padding_that_a_tokenizer_was_saved_with_are_switched_off(tmp_path):
    core = bpe()
    core.enable_truncation(3)
    core.enable_padding(length=8)
    core.save(str(directory(tmp_path, config={"eos_token_id": EOS}) / "tokenizer.json"))
    assert Tokenizer.from_directory(tmp_path).encode("abcde") == ids("abcde")


def test_vocab_size_covers_the_highest_id():
    core = tokenizers.Tokenizer(models.BPE(vocab={"</s>": 0, "a": 9}, merges=[]))
    assert Tokenizer(core, 0).vocab_size == 10


def test_byte_level_text_survives_the_round_trip():
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["Human: what? Assistant: that."] * 20, trainer)
    tokenizer = Tokenizer(core, 0)
    question, answer = "\n\nHuman: Wie heißt 😀?\n\nAssistant:", " Ça  va.\n"
    encoded = tokenizer.encode_pair(pair(question, answer, " no"))
    assert tokenizer.decode(encoded.prompt) == question
    assert tokenizer.decode(encoded.chosen) == answer
    assert tokenizer.bos_id is None


# A published tokenizer

DIALOGUE = "\n\nHuman: Tell me a story.\n\nAssistant:"


@needs_stories
def test_the_published_llama_tokenizer_puts_bos_first_and_no_stray_space_before_an_ending():
    tokenizer = Tokenizer.from_directory(STORIES)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (2, 1, 512)
    encoded = tokenizer.encode_pair(pair("Once upon a time", ", Lily", " and"))
    assert encoded.prompt[0] == 1 and 1 not in encoded.prompt[1:] + encoded.chosen + encoded.rejected
    assert not tokenizer.piece(encoded.chosen[0]).startswith("▁")
    assert tokenizer.piece(tokenizer.encode(", Lily", add_special_tokens=False)[0]).startswith(
        "▁"
    )  # the foil
    assert tokenizer.decode(encoded.prompt + encoded.chosen) == "Once upon a time, Lily"


@needs_stories
def test_ids_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(STORIES), Tokenizer.from_directory(STORIES)
    endings = " Once upon a time.", " No, 😀 never!\n\n"
    for sample in ("", "a", DIALOGUE, *endings, DIALOGUE + endings[0]):
        assert ours.encode(sample) == theirs(sample)["input_ids"]
    encoded = ours.encode_pair(pair(DIALOGUE, *endings))
    for ending, text in zip((encoded.chosen, encoded.rejected), endings, strict=True):
        assert encoded.prompt + ending == [*theirs(DIALOGUE + text)["input_ids"], theirs.eos_token_id]
    assert ours.decode(encoded.chosen) == theirs.decode(encoded.chosen, skip_special_tokens=True)
