"""Model directories in and out: nothing lost, nothing guessed, nothing read that was not meant."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES
from minidpo.data import PairTokens
from minidpo.errors import UserError
from minidpo.model import load_model, load_reward_model, model_fingerprint, save_model, save_reward_model
from minidpo.packing import pack
from minidpo.textbook import pad as pad_rows
from tiny import EOS, edit_config, random_pairs, tiny_model, tiny_reward_model

TOKENS = torch.arange(40).view(2, 20)
INDEX = "model.safetensors.index.json"


def rewrite(directory, change) -> None:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file)


def shard(directory) -> dict[str, str]:
    """Split model.safetensors in two files and an index, as transformers does with large models."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in (0, 1):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: tensor for name, tensor in sorted(tensors.items())[i::2]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, {"weight_map": weight_map})
    return weight_map


def write_index(directory, index) -> None:
    (directory / "model.safetensors").unlink(missing_ok=True)
    (directory / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))


@pytest.mark.parametrize("links", [False, True], ids=["files", "links"])
def test_shards(directory, links):
    """They load as the single file; links to elsewhere do, too, of which Hugging Face's cache consists."""
    whole = load_model(directory)
    shard(directory)
    if links:
        (directory / "blobs").mkdir()
        for i, file in enumerate(sorted(directory.glob("*-of-*"))):
            file.rename(directory / "blobs" / str(i))
            file.symlink_to(directory / "blobs" / str(i))
    assert torch.equal(load_model(directory)(TOKENS), whole(TOKENS))


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED_AS = {
    "both": lambda t: {HEAD: t[EMBEDDING].clone()} | t,
    "lm_head alone": lambda t: {HEAD if name == EMBEDDING else name: tensor for name, tensor in t.items()},
    "lm_head differs": lambda t: {HEAD: 1.5 * t[EMBEDDING]} | t,
}


@pytest.mark.parametrize("stored", STORED_AS)
def test_tied(tmp_path, capsys, stored):
    """However a tied pair is stored, the logits are those of transformers: what is stored is used."""
    transformers = pytest.importorskip("transformers")
    model = tiny_model(tie_word_embeddings=True)
    save_model(model, tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    rewrite(tmp_path, STORED_AS[stored])
    logits, differs = load_model(tmp_path)(TOKENS), stored == "lm_head differs"
    assert torch.allclose(logits, model(TOKENS)) != differs
    assert ("stored with other values" in capsys.readouterr().out) == differs
    with torch.no_grad():
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits
    torch.testing.assert_close(peer, logits, rtol=1e-4, atol=1e-4)
    save_model(load_model(tmp_path), tmp_path / "again")
    assert torch.equal(load_model(tmp_path / "again")(TOKENS), logits)


def tensors_of(change):
    return lambda directory: rewrite(directory, change)


def renamed(name, other):
    return lambda directory: (directory / name).rename(directory / other)


def norm_in(file):
    """The index says that the norm is in `file`, which is a copy of the model where it is elsewhere."""

    def spoil(directory) -> None:
        (directory / "sub").mkdir()
        for place in (directory.parent, directory / "sub"):
            shutil.copy(directory / "model.safetensors", place / "model.safetensors")
        write_index(directory, {"weight_map": shard(directory) | {NORM: file}})

    return spoil


NORM = "model.norm.weight"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1044496\n"
BROKEN = {
    "a tensor short": (tensors_of(lambda t: {k: t[k] for k in t if k != NORM}), f"no tensor '{NORM}'"),
    "one too many": (tensors_of(lambda t: t | {"extra": torch.ones(1)}), "'extra' has no place"),
    "another shape": (tensors_of(lambda t: t | {NORM: torch.ones(31)}), f"'{NORM}' is (31,) in F32; (32,)"),
    "whole numbers": (tensors_of(lambda t: t | {NORM: t[NORM].int()}), f"'{NORM}' is (32,) in I32; (32,)"),
    "no safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"x"), "not a safetensors file"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "only pickles": (renamed("model.safetensors", "pytorch_model.bin"), "pickles and are not read"),
    "torn config": (lambda d: (d / "config.json").write_text("[1"), "config.json: not JSON"),
    "lfs": (lambda d: (d / "model.safetensors").write_bytes(POINTER), "a git-lfs pointer, not the file"),
    "lfs config": (lambda d: (d / "config.json").write_bytes(POINTER), "config.json: a git-lfs pointer"),
    "adapter": (renamed("config.json", "adapter_config.json"), "merge it first"),
    "no config": (lambda d: (d / "config.json").unlink(), "no such file"),
    "torn index": (lambda d: write_index(d, "{"), "index.json: not JSON"),
    "index of numbers": (lambda d: write_index(d, {"weight_map": {"a": 3}}), "not an index of shards"),
    "index that lies": (norm_in("model-00002-of-00002.safetensors"), f"does not contain tensor {NORM}"),
    **{
        f"index to {file}": (norm_in(file), "is not a file in")
        for file in ("../model.safetensors", "/etc/hostname", "sub/model.safetensors", "gone")
    },
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), BROKEN.values(), ids=BROKEN.keys())
def test_broken(directory, spoil, said):
    """The error names the directory, and in it the file or the tensor."""
    spoil(directory)
    with pytest.raises(UserError) as error:
        load_model(directory)
    assert said in str(error.value) and str(directory) in str(error.value)


def test_fingerprint(directory):
    """It follows config and weights."""
    before = model_fingerprint(directory)
    assert model_fingerprint(directory) == before
    rewrite(directory, lambda tensors: tensors | {NORM: torch.ones(32)})
    after_weights = model_fingerprint(directory)
    edit_config(directory, lambda config: config.update(rope_theta=3.0, rope_parameters=None))
    assert len({before, after_weights, model_fingerprint(directory)}) == 3


@pytest.mark.parametrize(
    "over",
    [
        *(dict(pad_token_id=pad, tie_word_embeddings=pad is None) for pad in (None, EOS, 0)),
        *(FAMILIES[name] for name in ("olmo2", "smollm3 tied, biases", "granite tied, biases", "phi4 mini")),
    ],
    ids=["no pad", "pads with EOS", "a pad", "olmo2", "smollm3", "granite", "phi4"],
)
def test_reward_model(tmp_path, over):
    """It scores the same in transformers, whichever token pads: none, EOS, or one of its own."""
    model = tiny_reward_model(**over)
    save_reward_model(model, tmp_path)
    pairs = random_pairs(np.random.default_rng(0), 6)
    batch = pack(PairTokens.from_pairs(pairs), scored=0)
    rewards = model.forward_packed(batch)[0]
    assert torch.equal(load_reward_model(tmp_path).forward_packed(batch)[0], rewards)
    if model.config.model_type == "granite":  # for which transformers has no such class
        return
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokens, scored = pad_rows([pair[:3] for pair in pairs])
    present = scored.flip(1).cummax(1).values.flip(1)  # up to the last scored token
    tokens[~present] = peer.config.pad_token_id  # and what lies behind it is padding
    with torch.no_grad():
        scores = peer(tokens, attention_mask=present.long()).logits.view(2, -1).T
    torch.testing.assert_close(scores, rewards.detach(), rtol=1e-5, atol=1e-5)


def test_other_kind(directory, tmp_path):
    """A language model gives no rewards, a saved reward model no logits."""
    with pytest.raises(UserError, match="no score.weight among its tensors"):
        load_reward_model(directory)
    save_reward_model(tiny_reward_model(), tmp_path)
    with pytest.raises(ValueError, match="no lm_head"):
        load_reward_model(tmp_path)(TOKENS)
