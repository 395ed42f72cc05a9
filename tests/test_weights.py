"""Model directories in and out: nothing lost, nothing guessed, nothing read that was not meant."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minidpo import tensor_files
from minidpo.errors import UserError
from minidpo.model import Llama3Rope
from minidpo.packing import PairTokens, Wanted, pack_row
from minidpo.weights import load_model, load_reward_model, model_fingerprint, save_model, save_reward_model
from tiny import EOS, edit_config, naive_rewards, padded_rows, random_pairs, tiny_model, tiny_reward_model

TOKENS = torch.arange(40).view(2, 20)
EVERYTHING = dict(
    model_type="qwen3", qk_norm=True, qkv_bias=True, output_bias=True, head_dim=16, rope_theta=777.0,
    rms_norm_eps=1e-4, rope_scaling=Llama3Rope(4.0, 1.0, 4.0, 32), tie_word_embeddings=True,
    eos_token_id=(2, 5), pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    for over in ({}, EVERYTHING, dict(model_type="mistral", sliding_window=33), dict(mlp_bias=True)):
        model = tiny_model(**over)
        save_model(model, tmp_path)
        loaded = load_model(tmp_path)
        # initializer_range and all else that transformers keeps; the numbers themselves bit for bit
        assert loaded.config == model.config
        assert torch.equal(loaded(TOKENS), model(TOKENS))
        assert not any(file.name.endswith(".tmp") for file in tmp_path.iterdir())


def test_weights_are_cast_to_the_dtype_asked_for_and_saved_in_their_own(directory):
    model = load_model(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_model(model, directory)
    assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {torch.bfloat16}
    assert load_model(directory).model.norm.weight.dtype == torch.float32


def test_loaded_parameters_are_trainable(directory):
    assert all(p.requires_grad for p in load_model(directory).parameters())


def test_shards_with_an_index_load_as_the_single_file(directory):
    whole = load_model(directory)
    shard(directory)
    assert torch.equal(load_model(directory)(TOKENS), whole(TOKENS))


def test_shards_that_are_links_load_as_in_the_download_cache(directory):
    whole = load_model(directory)
    shard(directory)
    (directory / "blobs").mkdir()
    for i, file in enumerate(sorted(directory.glob("*-of-*"))):
        file.rename(directory / "blobs" / str(i))
        file.symlink_to(directory / "blobs" / str(i))
    assert torch.equal(load_model(directory)(TOKENS), whole(TOKENS))


def test_a_tied_file_loads_with_and_without_its_copy_of_lm_head(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda t: {"lm_head.weight": t["model.embed_tokens.weight"].clone()} | t)
    assert torch.equal(load_model(tmp_path)(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, "no tensor 'model.norm.weight'"),
        (lambda t: t | {"model.layers.0.extra": torch.ones(1)}, "'model.layers.0.extra' has no place"),
        (lambda t: t | {"model.norm.weight": torch.ones(31)}, "'model.norm.weight' has shape (31,)"),
        (lambda t: t | {"score.weight": torch.ones(1, 32)}, "'score.weight' has no place"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_names_the_tensor(directory, spoil, named):
    rewrite(directory, spoil)
    with pytest.raises(UserError) as error:
        load_model(directory)
    assert named in str(error.value) and str(directory) in str(error.value)


def test_an_untied_config_with_a_tied_file_is_an_error(tmp_path):
    save_model(tiny_model(tie_word_embeddings=True), tmp_path)
    edit_config(tmp_path, lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(UserError, match="no tensor 'lm_head.weight'"):
        load_model(tmp_path)


@pytest.mark.parametrize("escape", ["../model.safetensors", "/etc/hostname", "sub/model.safetensors", "gone"])
def test_an_index_that_points_elsewhere_is_an_error(directory, escape):
    shutil.copy(directory / "model.safetensors", directory.parent / "model.safetensors")
    (directory / "sub").mkdir()
    shutil.copy(directory / "model.safetensors", directory / "sub" / "model.safetensors")
    shard(directory)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = escape
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not a file in"):
        load_model(directory)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_an_error(directory, content):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="not an index of shards"):
        load_model(directory)


def test_broken_and_missing_files_are_errors_that_say_which(directory):
    (directory / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="model.safetensors: not a safetensors file"):
        load_model(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        load_model(directory)
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles and are not read"):
        load_model(directory)
    (directory / "config.json").write_text("[1")
    with pytest.raises(UserError, match="config.json: not JSON"):
        load_model(directory)
    with pytest.raises(UserError, match="no such file"):
        load_model(directory / "nowhere")


def test_the_fingerprint_follows_config_and_weights(directory):
    before = model_fingerprint(directory)
    assert model_fingerprint(directory) == before
    rewrite(directory, lambda tensors: tensors | {"model.norm.weight": torch.ones(32)})
    after_weights = model_fingerprint(directory)
    edit_config(directory, lambda config: config.update(rope_theta=3.0, rope_parameters=None))
    assert len({before, after_weights, model_fingerprint(directory)}) == 3


@pytest.mark.parametrize("pad", [None, EOS, 0], ids=["no pad", "pad is eos", "own pad"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_scores_the_same_in_transformers(tmp_path, rng, pad, tied):
    transformers = pytest.importorskip("transformers")
    model = tiny_reward_model(pad_token_id=pad, tie_word_embeddings=tied)
    save_reward_model(model, tmp_path)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    pairs = random_pairs(rng, 6)
    tokens, scored = padded_rows(pairs)
    present = scored.flip(1).cummax(1).values.flip(1)  # up to the last scored token
    tokens[~present] = peer.config.pad_token_id  # and what lies behind it is padding
    with torch.no_grad():
        scores = peer(tokens, attention_mask=present.long()).logits.view(2, -1).T
        row = pack_row(PairTokens.from_pairs(pairs), Wanted(rewards=True))
        ours, reread = model.pair_rewards(row)[0], load_reward_model(tmp_path).pair_rewards(row)[0]
    torch.testing.assert_close(scores, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(naive_rewards(model, pairs), ours, rtol=1e-5, atol=1e-5)
    assert torch.equal(reread, ours)


def test_a_loaded_reward_model_without_lm_head_refuses_to_speak(tmp_path):
    save_reward_model(tiny_reward_model(), tmp_path)
    with pytest.raises(ValueError, match="no lm_head"):
        load_reward_model(tmp_path)(TOKENS)


def test_a_language_model_is_not_a_reward_model(directory):
    with pytest.raises(UserError, match="no score.weight among its tensors"):
        load_reward_model(directory)


def rewrite(directory, change) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


def shard(directory) -> None:
    """Split model.safetensors in two files and an index, as transformers does with large models."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in (0, 1):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: tensor for name, tensor in sorted(tensors.items())[i::2]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_large_model_is_written_in_shards_that_open_here_and_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "MOST_BYTES", 20_000)
    model = tiny_model()
    save_model(model, tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    # The largest tensor alone may exceed the limit; otherwise none does, but for its header.
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 22_000
    ours = load_model(tmp_path).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
