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
from minidpo.files import fingerprint, read_object, replacing_file
from minidpo.log import print0
from minidpo.model.adapter_files import SCORE, STEM, adapter_settings, load_adapter
from minidpo.model.hf_config import REWARD_LABEL, format_config, read_config
from minidpo.model.lora import adapted_layers, add_adapters, fresh_adapter, is_adapter
from minidpo.model.reward_model import RewardModel, fresh_score
from minidpo.model.tensors import equal_tensors, read_tensors, tensor_files, write_tensors
from minidpo.model.transformer import Transformer

Model = TypeVar("Model", bound=Transformer)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # one matrix if they are tied
# Called on a model that has no weights yet, to shard it over several processes.
Prepare = Callable[[Transformer], None]


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Prepare = lambda model: None,
    adapter: str | Path | None = None,
) -> Transformer:
    """The causal language model of a Hugging Face directory, its weights cast to `dtype` on `device`.

    adapter: a directory with adapters for it. Raises UserError for a missing file, a model family or field
    that is not supported, or weights that do not fit the config.
    """
    if adapter:
        prepare = partial(add_adapters, lora=adapter_settings(Path(adapter)))
    model = _load(Transformer, Path(directory), dtype, device, prepare)
    if adapter:
        load_adapter(model, Path(adapter), model_fingerprint(directory))
    return model


def load_reward_model(
    directory: str | Path, device: torch.device | str = "cpu", adapter: str | Path | None = None
) -> RewardModel:
    """A reward model of `save_reward_model`, or transformers' sequence classification with one label.

    adapter: a directory with adapters for it, and maybe with the head that a language model lacks.
    """
    if adapter:
        add, path = partial(add_adapters, lora=adapter_settings(Path(adapter))), Path(directory)
        new_score = SCORE in tensor_files(Path(adapter), STEM)  # whether the adapter has a head of its own
        if not new_score:
            require_reward_model(path)
        model = _load(RewardModel, path, torch.float32, device, add, lm_head=False, new_score=new_score)
        load_adapter(model, Path(adapter), model_fingerprint(path))
        return model
    require_reward_model(Path(directory))
    # Classification models are saved without the output matrix; only the language-modelling loss needs it.
    lm_head = HEAD in tensor_files(Path(directory))
    return _load(RewardModel, Path(directory), torch.float32, device, lm_head=lm_head)


def require_reward_model(directory: Path) -> None:
    """Raises UserError unless the directory holds the weights of a reward model, judging by their names."""
    read_config(directory)
    if "score.weight" not in tensor_files(directory):
        hint = "a reward model is needed, such as the final/ of a run of train_rm.py"
        raise UserError(f"{directory}: no score.weight among its tensors: a language model; {hint}")


def reward_read_at(directory: Path) -> str:
    """Where in a text a reward model was trained: at its "end of text" in general, at "EOS of text" without
    messages, or at "EOS", whatever followed, by an older version. Empty if no run of this package did."""
    fields = read_object(directory / "config.json")
    return fields.get("reward_read_at") or ("EOS" if fields.get("id2label") == REWARD_LABEL else "")


def new_reward_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    language_modelling: bool = True,
    prepare: Prepare = lambda model: None,
) -> RewardModel:
    """The language model of a directory with a fresh head, drawn from torch's generator; float32.

    language_modelling: whether to keep the output matrix, which the language-modelling loss needs.
    """
    path = Path(directory)
    return _load(
        RewardModel, path, torch.float32, device, prepare, lm_head=language_modelling, new_score=True
    )


def save_model(
    model: Transformer, directory: str | Path, lm_head: bool = True, dtype: torch.dtype | None = None
) -> None:
    """Write config.json and the weights, which transformers opens unchanged. Weights keep their dtype.

    Adapters are merged into the weights, which are then written in `dtype` (default: that of the adapters).
    All ranks of a run call it: rank 0 writes, the others only hand over their shards.
    """
    reshard(model)  # state_dict() would miss the sharded weights where an evaluation has left them gathered.
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    if not lm_head:
        tensors.pop(HEAD, None)
    layers = adapted_layers(model)
    if layers and dtype is None:
        dtype = next(iter(layers.values())).lora_A.dtype

    def merged(name: str, full: Tensor) -> Tensor:
        layer = layers.get(name.removesuffix(".weight"))
        return layer.merge(full) if layer else full

    write_tensors(Path(directory), tensors, fused=model.config.fused_projections, dtype=dtype, change=merged)
    if rank() == 0:
        kind = str(dtype or model.model.norm.weight.dtype).removeprefix("torch.")
        fields = format_config(model.config, isinstance(model, RewardModel), kind)
        with replacing_file(Path(directory, "config.json")) as temporary:
            temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


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
    dtype: torch.dtype,
    device: torch.device | str,
    prepare: Prepare = lambda model: None,
    lm_head: bool = True,
    new_score: bool = False,
) -> Model:
    """A model with the weights of a directory, which must hold its parameters and nothing else.

    lm_head: whether an untied model has its output matrix. new_score: whether the head is drawn, not read.
    """
    config, files = read_config(directory), tensor_files(directory)
    both = (EMBEDDING, HEAD)
    if config.tie_word_embeddings and files.keys() >= {*both} and not equal_tensors(files, both, dtype):
        print0(
            f"warning: {directory}: config.json ties {HEAD} to {EMBEDDING}, which is stored with other"
            " values; what is stored is used, and they are no longer tied"
        )
        config = replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = kind(config).to(dtype)
    if not lm_head:
        model.lm_head = None
    prepare(model)
    expected = model.state_dict()
    score = expected.pop("score.weight") if new_score else None
    adapters = {name: expected.pop(name) for name in [*filter(is_adapter, expected)]}
    # Of a tied pair, some programs store the other name alone.
    other_name = config.tie_word_embeddings and HEAD in files and EMBEDDING not in files
    if other_name:
        expected[HEAD] = expected.pop(EMBEDDING)
    # Files of a tied model may still hold the copy that tying made, and older files hold the rotary buffer.
    unused = {HEAD} if model.lm_head is None else set()
    extra = {name for name in files if not name.endswith("rotary_emb.inv_freq")} - expected.keys() - unused
    if extra:
        hint = "it is a reward model's, or config.json is another model's"
        raise UserError(f"{directory}: tensor {min(extra)!r} has no place in this model; {hint}")
    tensors = dict(read_tensors(directory, expected, device))
    if other_name:
        tensors[EMBEDDING] = tensors.pop(HEAD)
    if score is not None:
        tensors["score.weight"] = shard_like(fresh_score(config.hidden_size).to(device), score)
    for name, like in adapters.items():
        tensors[name] = shard_like(fresh_adapter(name, like).to(device, like.dtype), like)
    model.load_state_dict(tensors, assign=True)
    return model
