"""Where prompt and response meet: the responses that were meant are scored, from their first token to EOS."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from characters import BOS, EOS, LETTERS, bpe, ids, pair
from minidpo.data import DataReport, Tokenizer, TokenPair, describe_pair, tokenize_pairs
from minidpo.errors import UserError

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="../shared/models/stories260k is not here")


# The boundary rule


@pytest.mark.parametrize(
    ("core", "texts", "expected"),
    [
        # The tokenizer merges across the boundary of both responses, and of one of them.
        (bpe([("b", "c")]), ("ab", "cd", "ce"), (ids("ab"), ids("cd"), ids("ce"))),
        (bpe([("b", "c")], bos=True), ("ab", "cc", "dd"), ([BOS, *ids("ab")], ids("cc"), ids("dd"))),
        # It prepends a space to every text, but a response is none.
        (bpe(bos=True, prepend=True), ("ab", "cd", " d"), ([BOS, *ids("▁ab")], ids("cd"), ids("▁d"))),
        # EOS is in the response already.
        (bpe(), ("a", "bc", "de</s>"), (ids("a"), ids("bc"), ids("de"))),
    ],
)
def test_boundary(core, texts, expected):
    """Prompt ids are those of the prompt alone, response ids what follows them, then EOS, once."""
    prompt, chosen, rejected = expected
    encoded = Tokenizer(core, EOS).encode_pair(pair(*texts))
    assert encoded == TokenPair(prompt, [*chosen, EOS], [*rejected, EOS], 0)


def test_foils_of_the_boundary():
    """The tokenizers above merge and prepend: otherwise they would prove nothing."""
    assert Tokenizer(bpe([("b", "c")]), EOS).encode("abcd")[:2] != ids("ab")
    assert Tokenizer(bpe(prepend=True), EOS).encode("cd", add_special_tokens=False) == ids("▁cd")


def test_prompt_without_a_token():
    """A pair whose prompt has no token is dropped and counted."""
    # With nothing before it, the first token of a response would be predicted by another pair's last.
    tokenizer, report = Tokenizer(bpe(), EOS), DataReport()
    kept = list(tokenize_pairs([pair("", "a", "b", 0), pair("a", "b", "c", 1)], tokenizer, 9, report=report))
    ((reason, numbers),) = report.dropped.items()
    assert [p.index for p in kept] == [1] and "nothing predicts" in reason and numbers == ["0"]
    assert Tokenizer(bpe(bos=True), EOS).encode_pair(pair("", "a", "b")).prompt == [BOS]


# Every token of one pair


def test_positions():
    """Positions of rejected restart where the prompt ended, and only responses are scored."""
    tokenizer = Tokenizer(bpe(), EOS)
    rows = describe_pair(
        tokenizer.encode_pair(pair("a</s>", "</s>d", "e")), tokenizer
    )  # EOS inside is no end
    assert [(row["role"], row["position"], row["piece"], row["scored"]) for row in rows] == [
        ("prompt", 0, "a", False),
        ("prompt", 1, "</s>", False),
        ("chosen", 2, "</s>", True),
        ("chosen", 3, "d", True),
        ("eos", 4, "</s>", True),
        ("rejected", 2, "e", True),
        ("eos", 3, "</s>", True),
    ]


# Loading


def test_vocab_size():
    """vocab_size covers the highest id."""
    core = tokenizers.Tokenizer(models.BPE(vocab={"</s>": 0, "a": 9}, merges=[]))
    assert Tokenizer(core, 0).vocab_size == 10


def test_round_trip():
    """Byte-level text survives the round trip."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(["Human: what? Assistant: that."] * 20, trainer)
    tokenizer = Tokenizer(core, 0)
    question, response = "\n\nHuman: Wie heißt 😀?\n\nAssistant:", " Ça  va.\n"
    encoded = tokenizer.encode_pair(pair(question, response, " no"))
    assert tokenizer.decode(encoded.prompt) == question
    assert tokenizer.decode(encoded.chosen) == response
    assert tokenizer.bos_id is None


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
def test_eos_of_files(tmp_path, files):
    """EOS is found in the first file that names it."""
    tokenizer = Tokenizer.from_pretrained(directory(tmp_path, **files))
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
def test_no_eos(tmp_path, files, said):
    """A tokenizer without EOS is refused by file and key."""
    with pytest.raises(UserError) as caught:
        Tokenizer.from_pretrained(directory(tmp_path, **files))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_no_tokenizer(tmp_path):
    """Files that are no tokenizer are refused."""
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0",\n "model": ')
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer[^\n]*fetch it again$"):
        Tokenizer.from_pretrained(tmp_path)
    directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_saved_truncation(tmp_path):
    """Truncation and padding that a tokenizer was saved with are switched off."""
    core = bpe()
    core.enable_truncation(3)
    core.enable_padding(length=8)
    core.save(str(directory(tmp_path, config={"eos_token_id": EOS}) / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path).encode("abcde") == ids("abcde")


# A published tokenizer

DIALOGUE = "\n\nHuman: Tell me a story.\n\nAssistant:"


@needs_stories
def test_published_tokenizer():
    """The published Llama tokenizer puts BOS first, and no stray space before a response."""
    tokenizer = Tokenizer.from_pretrained(STORIES)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (2, 1, 512)
    encoded = tokenizer.encode_pair(pair("Once upon a time", ", Lily", " and"))
    assert encoded.prompt[0] == 1 and 1 not in encoded.prompt[1:] + encoded.chosen + encoded.rejected
    assert not tokenizer.piece(encoded.chosen[0]).startswith("▁")
    foil = tokenizer.encode(", Lily", add_special_tokens=False)
    assert tokenizer.piece(foil[0]).startswith("▁")
    assert tokenizer.decode(encoded.prompt + encoded.chosen) == "Once upon a time, Lily"


@needs_stories
def test_ids_of_transformers():
    """Ids equal those of transformers."""
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(STORIES), Tokenizer.from_pretrained(STORIES)
    responses = " Once upon a time.", " No, 😀 never!\n\n"
    for sample in ("", "a", DIALOGUE, *responses, DIALOGUE + responses[0]):
        assert ours.encode(sample) == theirs(sample)["input_ids"]
    encoded = ours.encode_pair(pair(DIALOGUE, *responses))
    for response, text in zip((encoded.chosen, encoded.rejected), responses, strict=True):
        assert encoded.prompt + response == [*theirs(DIALOGUE + text)["input_ids"], theirs.eos_token_id]
    assert ours.decode(encoded.chosen) == theirs.decode(encoded.chosen, skip_special_tokens=True)
