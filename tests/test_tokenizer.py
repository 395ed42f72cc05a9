"""Where prompt and ending meet: the endings that were meant are scored, from their first token to EOS."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from characters import BOS, EOS, bpe, ids, pair
from minidpo import tokenizer as module
from minidpo.data import DataReport
from minidpo.tokenizer import Tokenizer, TokenPair, describe_pair, tokenize_pairs

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not here")


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


def test_eos_is_appended_once():
    encoded = Tokenizer(bpe(), EOS).encode_pair(pair("a", "bc", "de</s>"))
    assert encoded.chosen == [*ids("bc"), EOS] and encoded.rejected == [*ids("de"), EOS]


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
