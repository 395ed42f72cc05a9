"""Hugging Face model directories, in and out: config.json and safetensors files. No pickle, ever."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from minidpo.distributed import rank, reshard, shard_like
from minidpo.errors import UserError
from minidpo.files import fingerprint, write_file
from minidpo.log import print0
from minidpo.model.adapter_files import SCORE, STEM, adapter_settings, load_adapter
from minidpo.model.hf_config import format_config, read_config, require_saveable
from minidpo.model.lora import adapted_layers, add_adapters, fresh_adapter, is_adapter
from minidpo.model.reward_model import RewardModel, fresh_score
from minidpo.model.tensors import read_tensors, tensor_files, write_tensors
from minidpo.model.transformer import Transformer

Model = TypeVar("Model", bound=Transformer)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one matrix if they are tied
# Called on a model that has no weights yet, to shard it over several processes.
Prepare = Callable[[Transformer], None]


def load_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    prepare: Prepare = lambda model: None,
    adapter: str | Path | None = None,
) -> Transformer:
    """The causal language model of a Hugging Face directory, with the adapters of another one, if given;
    float32.

    Raises UserError for a missing file, an unsupported family or field, or weights that do not fit it.
    """
    return _load(Transformer, Path(directory), device, prepare, adapter=adapter)


def load_reward_model(
    directory: str | Path, device: torch.device | str = "cpu", adapter: str | Path | None = None
) -> RewardModel:
    """A reward model of `save_reward_model`, or transformers' sequence classification with one label; also a
    language model with an adapter that has a head. There is no output matrix: nothing reads its logits."""
    path = Path(directory)
    new = adapter is not None and SCORE in tensor_files(Path(adapter), STEM)
    if not new:
        require_reward_model(path)
    return _load(RewardModel, path, device, lm_head=False, new_score=new, adapter=adapter)


def require_reward_model(directory: Path) -> None:
    """Raises UserError unless the directory holds the weights of a reward model, judging by their names."""
    read_config(directory)
    if "score.weight" not in tensor_files(directory):
        hint = (
            "a reward model is needed, such as the final/ of a run of train_rm.py (score: give it as --model)"
        )
        raise UserError(f"{directory}: no score.weight among its tensors: a language model; {hint}")


def require_language_model(directory: Path) -> None:
    """Raises UserError if the directory holds a reward model, judging by the names of its weights."""
    if "score.weight" in tensor_files(directory):
        raise UserError(f"{directory}: a reward model (score.weight), where a language model is needed")


def new_reward_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    language_modelling: bool = True,
    prepare: Prepare = lambda model: None,
) -> RewardModel:
    """The language model of a directory with a fresh head, drawn from torch's generator; float32. The output
    matrix is kept for `language_modelling` alone."""
    path, lm_head = Path(directory), language_modelling
    return _load(RewardModel, path, device, prepare, lm_head=lm_head, new_score=True)


def save_model(
    model: Transformer, directory: str | Path, lm_head: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write config.json and the weights, which transformers opens unchanged. Weights keep their dtype.

    Adapters are merged into the weights, which are then written in `dtype` (default: that of the adapters).
    All ranks of a run call it: rank 0 writes, the others only hand over their shards.
    """
    require_saveable(model.config)
    reshard(model)  # state_dict() would miss the sharded weights where an evaluation has left them gathered.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    if not lm_head:
        tensors.pop(HEAD, None)
    layers = adapted_layers(model)
    dtype = dtype or next((layer.lora_A.dtype for layer in layers.values()), None)

    def merged(name: str, full: Tensor) -> Tensor:
        layer = layers.get(name.removesuffix(".weight"))
        return layer.merge(full) if layer else full

    write_tensors(Path(directory), tensors, dtype=dtype, change=merged)
    if rank() == 0:
        kind = str(dtype or model.model.norm.weight.dtype).removeprefix("torch.")
        fields = format_config(model.config, isinstance(model, RewardModel), kind)
        write_file(Path(directory, "config.json"), json.dumps(fields, indent=2) + "\n")


def save_reward_model(model: RewardModel, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """As `save_model`, but without the output matrix: the form of transformers' sequence classification."""
    save_model(model, directory, lm_head=False, dtype=dtype)


def model_fingerprint(directory: str | Path) -> str:
    """One digest of everything that the numbers of a model directory depend on."""
    directory = Path(directory)
    return fingerprint(directory / "config.json", *sorted(set(tensor_files(directory).values())))


def _load(
    kind: type[Model],
    directory: Path,
    device: torch.device | str,
    prepare: Prepare = lambda model: None,
    lm_head: bool = True,
    new_score: bool = False,
    adapter: str | Path | None = None,
) -> Model:
    """A model with the weights of a directory, which must hold its parameters and nothing else.

    lm_head: whether an untied model has its output matrix. new_score: whether the head is drawn, not read.
    """
    if adapter:
        prepare = partial(add_adapters, lora=adapter_settings(Path(adapter)))
    config, files, both = read_config(directory), tensor_files(directory), {EMBEDDING, HEAD}
    if config.tie_word_embeddings and files.keys() >= both:
        like = torch.empty(config.vocab_size, config.hidden_size, device="meta")
        if not torch.equal(*dict(read_tensors(directory, dict.fromkeys(both, like), "cpu")).values()):
            told = f"config.json ties {HEAD} to {EMBEDDING}, which is stored with other values"
            print0(f"warning: {directory}: {told}; what is stored is used, and they are no longer tied")
            config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = kind(config)
    if not lm_head:
        model.lm_head = None
    prepare(model)
    expected = model.state_dict()
    drawn = [name for name in expected if is_adapter(name) or new_score and name == "score.weight"]
    likes = {name: expected.pop(name) for name in sorted(drawn, key=is_adapter)}  # the head comes first
    # Of a tied pair, some programs store the other name alone.
    other_name = config.tie_word_embeddings and HEAD in files and EMBEDDING not in files
    if other_name:
        expected[HEAD] = expected.pop(EMBEDDING)
    # Files of a tied model may still hold the copy that tying made, and older files hold the rotary buffer.
    unused = {HEAD} if model.lm_head is None else set()
    extra = {name for name in files if not name.endswith("rotary_emb.inv_freq")} - expected.keys() - unused
    if extra:
        hint = "it is a reward model's (score: --reward-model), or config.json is another model's"
        raise UserError(f"{directory}: tensor {min(extra)!r} has no place in this model; {hint}")
    tensors = dict(read_tensors(directory, expected, device))
    if other_name:
        tensors[EMBEDDING] = tensors.pop(HEAD)
    for name, like in likes.items():
        value = fresh_adapter(name, like) if is_adapter(name) else fresh_score(config.hidden_size)
        tensors[name] = shard_like(value.to(device, like.dtype), like)
    model.load_state_dict(tensors, assign=True)
    if adapter:
        load_adapter(model, Path(adapter), model_fingerprint(directory))
    return model
