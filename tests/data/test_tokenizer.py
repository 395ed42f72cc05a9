"""What a tokenizer's directory says: where a text ends, which tokens are special, and what is refused."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from characters import BOS, EOS, LETTERS, bpe, ids, pair
from minidpo.data import Tokenizer
from minidpo.errors import UserError

NEXT = 2 + len(LETTERS)  # the first id that the tokenizer below does not have


def directory(path: Path, **files: object) -> Path:
    """A directory of the character tokenizer, with the JSON files named."""
    bpe(bos=True).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


TEXT = {"eos_token": "</s>"}
OPTIONS = {"eos_token": {"content": "</s>", "lstrip": False}}


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({"tokenizer_config": TEXT}, {EOS}),
        ({"tokenizer_config": OPTIONS, "config": {"eos_token_id": 5}}, {EOS, 5}),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": TEXT}, {EOS}),
        ({"special_tokens_map": OPTIONS, "config": {"eos_token_id": [5, 6]}}, {EOS, 5, 6}),
        ({"config": {"eos_token_id": EOS}, "generation_config": {"eos_token_id": 7}}, {EOS, 7}),
        ({"config": {"eos_token_id": [EOS, 5]}, "generation_config": {"eos_token_id": [5, 7]}}, {EOS, 5, 7}),
    ],
)
def test_eos(tmp_path, files, stops):
    """The first file that names EOS decides how a text ends; generation ends at all that are named."""
    tokenizer = Tokenizer.from_pretrained(directory(tmp_path, **files))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (EOS, BOS, NEXT)
    assert tokenizer.stop_ids == stops


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "tokenizer_config.json: no eos_token"),
        ({"config": {"vocab_size": NEXT}, "tokenizer_config": {"eos_token": "<end>"}}, "'<end>' is not in"),
        ({"config": {"eos_token_id": 99}}, "config.json: eos_token_id 99 is not in"),
        ({"tokenizer_config": ["</s>"]}, "tokenizer_config.json: a JSON list"),
    ],
)
def test_no_eos(tmp_path, files, said):
    """A tokenizer without EOS is refused by file and key."""
    with pytest.raises(UserError) as caught:
        Tokenizer.from_pretrained(directory(tmp_path, **files))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


# Tokens that only the files beside tokenizer.json name: "j" is in its vocabulary, <x> and <y> are not.


def test_named_tokens(tmp_path):
    """A special token that only the other files name has the next free id, and is not decoded."""
    files = {"config": {"vocab_size": 99}, "tokenizer_config": TEXT}
    before = Tokenizer.from_pretrained(directory(tmp_path, **files))
    files["tokenizer_config"] = {"eos_token": "j", "extra_special_tokens": ["<x>"]}
    tokenizer = Tokenizer.from_pretrained(directory(tmp_path, **files))
    assert tokenizer.encode("aj<x>b") == [BOS, *ids("aj"), NEXT, *ids("b")]
    assert tokenizer.decode([*ids("aj"), NEXT]) == before.decode(ids("a"))
    assert tokenizer.identity != before.identity and tokenizer.conflict(before) == ""


PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
X, Y, J = ({"content": text} | PLAIN for text in ("<x>", "<y>", "j"))
BY_ID = {"40": Y, "9": X | {"special": False}, "11": J}  # By number, <x> comes first.


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("tokenizer_config", {"eos_token": "j", "pad_token": "<x>"}),
        ("special_tokens_map", {"eos_token": "j", "pad_token": "<x>"}),
        ("tokenizer_config", {"eos_token": {"__type": "AddedToken"} | J}),
        ("tokenizer_config", TEXT | {"additional_special_tokens": ["<x>", "j"]}),
        ("tokenizer_config", TEXT | {"extra_special_tokens": ["<y>", "<x>"]}),
        ("tokenizer_config", TEXT | {"extra_special_tokens": {"x": "<x>"}, "image_token": "<y>"}),
        ("tokenizer_config", TEXT | {"pad_token": "<x>", "added_tokens_decoder": BY_ID}),
        ("tokenizer_config", TEXT | {"model_specific_special_tokens": {"x_token": "<x>"}}),
    ],
)
def test_transformers(tmp_path, file, named):
    """Named tokens have the ids that transformers gives them."""
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 99, "model_type": "llama", "eos_token_id": 0}
    files = {"config": config, "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    files[file] = files.get(file, {}) | named
    path = directory(tmp_path, **files)
    ours, theirs = Tokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    text_ids = theirs("a<x> j <y>bj</s>ab")["input_ids"]
    assert ours.encode("a<x> j <y>bj</s>ab") == text_ids
    assert ours.decode(text_ids) == theirs.decode(text_ids, skip_special_tokens=True)
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_no_row(tmp_path):
    """A named token for which the model has no row is refused where a text holds it, and only there."""
    files = {"config": {"vocab_size": NEXT}, "tokenizer_config": TEXT | {"pad_token": "<x>"}}
    tokenizer = Tokenizer.from_pretrained(directory(tmp_path, **files))
    assert tokenizer.vocab_size == NEXT and tokenizer.encode("ab") == [BOS, *ids("ab")]
    with pytest.raises(UserError, match="holds '<x>', for which the model has no row"):
        tokenizer.encode_pairs([pair("a", "b<x>", "c")])[0]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("text", ["<x>a b<x>ccc", " a<x> <y>▁<x>", "<y>a<y> b <x><x>", "a b", " a"])
def test_text_of_ids(bos, text):
    """The text of a prompt's ids has these ids, though a space is put behind every special token."""
    core = bpe([("▁", "a")], bos=bos, prepend=True)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1)])
    core.add_special_tokens(["<x>"])
    core.add_tokens(["<y>"])
    tokenizer = Tokenizer(core, EOS)
    prompt = tokenizer.encode(text)
    assert tokenizer.prompt_ids(tokenizer.prompt(prompt)) == prompt


def test_conflict():
    """Two tokenizers conflict if an id is another token to each; merges and new tokens are harmless."""
    more, renamed = bpe(), bpe()
    more.add_special_tokens(["<x>"])
    renamed.add_special_tokens(["<y>"])
    ours = Tokenizer(bpe(), EOS)
    for core in (bpe([("b", "c")], bos=True, prepend=True), more, renamed):
        assert not ours.conflict(Tokenizer(core, EOS)) and not Tokenizer(core, BOS).conflict(ours)
    assert not Tokenizer(more, EOS).conflict(Tokenizer(renamed, EOS))
    for letters in (LETTERS.replace("ab", "ba"), LETTERS.replace("j", "k")):
        other = Tokenizer(bpe(letters=letters), EOS)
        assert ours.conflict(other) and other.conflict(ours)


# tokenizer.json


def test_saved_truncation():
    """Truncation and padding that were saved are switched off; vocab_size is the highest id + 1."""
    core = bpe()
    core.enable_truncation(3)
    core.enable_padding(length=8)
    assert Tokenizer(core, EOS).encode("abcde") == ids("abcde")
    sparse = tokenizers.Tokenizer(models.BPE(vocab={"</s>": 0, "a": 9}, merges=[]))
    assert Tokenizer(sparse, EOS).vocab_size == 10
