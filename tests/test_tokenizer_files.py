"""Tokenizers as directories hold them: which file names EOS, and what is refused or switched off."""

import json
from pathlib import Path

import pytest

from characters import BOS, EOS, LETTERS, bpe, ids
from minidpo.errors import UserError
from minidpo.tokenizer import Tokenizer


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
