"""Hugging Face model directories, in and out: config.json, model.safetensors or its shards. No pickle, ever."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from minidpo.distributed import own_part
from minidpo.errors import UserError
from minidpo.files import fingerprint, replacing_file
from minidpo.hf_config import format_config, read_config
from minidpo.model import ModelConfig, Transformer
from minidpo.reward import RewardModel, fresh_score
from minidpo.tensor_files import read_tensors, tensor_files, write_tensors

# Done to a model that has no weights yet, such as sharding it over several processes.
Prepare = Callable[[nn.Module], None]


def load_model(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Prepare = lambda model: None,
) -> Transformer:
    """The causal language model of a Hugging Face directory, weights cast to `dtype` on `device`.

    Raises UserError for a missing file, a model family or field that is not supported, or weights that do not
    fit the config.
    """
    directory = Path(directory)
    config = _config_that_fits(directory)
    with torch.device("meta"):
        model = Transformer(config)
    prepare(model)
    _load_weights(model, directory, dtype, device)
    return model


def load_reward_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """A reward model as `save_reward_model` (or transformers' sequence classification, one label) wrote it."""
    directory = Path(directory)
    require_reward_model(directory)
    config = _config_that_fits(directory)
    with torch.device("meta"):
        model = RewardModel(config)
    if "lm_head.weight" not in tensor_files(directory):
        model.lm_head = None  # classification models are saved without; only the LM regulariser needs it
    _load_weights(model, directory, dtype, device)
    return model


def require_reward_model(directory: Path) -> None:
    """Raises UserError unless the directory holds a reward model's weights, as far as their names say."""
    read_config(directory)
    if "score.weight" not in tensor_files(directory):
        raise UserError(
            f"{directory}: no score.weight among its tensors: a language model; a reward model is needed, such as the"
            " final/ of a run of train_rm.py"
        )


def new_reward_model(
    directory: str | Path,
    device: torch.device | str = "cpu",
    language_modelling: bool = True,
    prepare: Prepare = lambda model: None,
) -> RewardModel:
    """The language model of a Hugging Face directory under a fresh head, drawn from torch's generator; float32.

    language_modelling: whether the output matrix is kept too, for the regulariser.
    """
    directory = Path(directory)
    config = _config_that_fits(directory)
    with torch.device("meta"):
        model = RewardModel(config)
    if not language_modelling:
        model.lm_head = None
    prepare(model)
    _load_weights(model, directory, torch.float32, device, fresh_head=True)
    return model


def save_model(model: Transformer, directory: str | Path) -> None:
    """Write config.json and the weights, which transformers opens unchanged. Weights keep their dtype."""
    _save(model, model.state_dict(), Path(directory))


def save_reward_model(model: RewardModel, directory: str | Path) -> None:
    """Write `model` as sequence classification with one label: score.weight, no lm_head."""
    _save(model, classification_tensors(model), Path(directory))


def classification_tensors(model: RewardModel) -> dict[str, Tensor]:
    """What a saved reward model holds: no output matrix."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def model_fingerprint(directory: str | Path) -> str:
    """One digest of everything the numbers of a model directory depend on."""
    directory = Path(directory)
    files = sorted({file for file in tensor_files(directory).values()})
    return fingerprint(directory / "config.json", *files)


def _save(model: Transformer, tensors: dict[str, Tensor], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    fields = format_config(model.config, sequence_classification=isinstance(model, RewardModel))
    fields["dtype"] = str(model.model.norm.weight.dtype).removeprefix("torch.")
    write_tensors(directory, tensors)
    with replacing_file(directory / "config.json") as path:
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _config_that_fits(directory: Path) -> ModelConfig:
    """The config, unless it means more layers than there are tensors: refused before modules are made for them."""
    config, tensors = read_config(directory), len(tensor_files(directory))
    if config.num_hidden_layers > tensors:
        raise UserError(
            f"{directory}: config.json means {config.num_hidden_layers} layers (num_hidden_layers), but there are"
            f" {tensors} tensors"
        )
    return config


def _load_weights(
    model: Transformer,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    fresh_head: bool = False,
) -> None:
    """Fill a model made on the meta device; every parameter must be there, in its shape, and nothing else."""
    files = tensor_files(directory)
    wanted = model.state_dict()
    head = {"score.weight": wanted.pop("score.weight")} if fresh_head else {}
    # A tied model may still carry the copy that tying made, and older ones the rotary buffer.
    unused = [k for k in files if k.endswith("rotary_emb.inv_freq")]
    if model.config.tie_word_embeddings or (fresh_head and model.lm_head is None):
        unused.append("lm_head.weight")
    found = files.keys() - set(unused)
    if missing := sorted(wanted.keys() - found):
        raise UserError(f"{directory}: no tensor {missing[0]!r} among its weights ({len(missing)} missing)")
    if extra := sorted(found - wanted.keys()):
        hint = "; it is a reward model, not a language model" if "score.weight" in extra else ""
        raise UserError(
            f"{directory}: tensor {extra[0]!r} has no place in this model ({len(extra)} such){hint}"
        )
    tensors = read_tensors(files, wanted, dtype, device)
    for name, place in head.items():
        tensors[name] = own_part(fresh_score(model.config.hidden_size).to(device), place)
    model.load_state_dict(tensors, strict=True, assign=True)
