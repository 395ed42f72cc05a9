"""Hugging Face model directories, in and out: config.json, model.safetensors or its shards. No pickle, ever."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minidpo.errors import UserError
from minidpo.files import fingerprint, replacing_file
from minidpo.hf_config import format_config, read_config
from minidpo.model import ModelConfig, Transformer
from minidpo.reward import RewardModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Transformer:
    """The causal language model of a Hugging Face directory, weights cast to `dtype` on `device`.

    Raises UserError for a missing file, a model family or field that is not supported, or weights that do not
    fit the config.
    """
    directory = Path(directory)
    config = read_config(directory)
    _require_room(config, directory)
    with torch.device("meta"):
        model = Transformer(config)
    _load_weights(model, directory, dtype, device)
    return model


def load_reward_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """A reward model as `save_reward_model` (or transformers' sequence classification, one label) wrote it."""
    directory = Path(directory)
    config = read_config(directory)
    _require_room(config, directory)
    with torch.device("meta"):
        model = RewardModel(config)
    if "lm_head.weight" not in _weight_files(directory):
        model.lm_head = None  # classification models are saved without; only the LM regulariser needs it
    _load_weights(model, directory, dtype, device)
    return model


def save_model(model: Transformer, directory: str | Path) -> None:
    """Write config.json and model.safetensors, which transformers opens unchanged. Weights keep their dtype."""
    _save(model, model.state_dict(), Path(directory))


def save_reward_model(model: RewardModel, directory: str | Path) -> None:
    """Write `model` as sequence classification with one label: score.weight, no lm_head."""
    _save(model, {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, Path(directory))


def model_fingerprint(directory: str | Path) -> str:
    """One digest of everything the numbers of a model directory depend on."""
    directory = Path(directory)
    files = sorted({file for file in _weight_files(directory).values()})
    return fingerprint(directory / "config.json", *files)


def _save(model: Transformer, tensors: dict[str, Tensor], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    fields = format_config(model.config, sequence_classification=isinstance(model, RewardModel))
    fields["dtype"] = str(model.model.norm.weight.dtype).removeprefix("torch.")
    with replacing_file(directory / WEIGHTS) as path:
        # "format" tells transformers that these are PyTorch's layouts.
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    with replacing_file(directory / "config.json") as path:
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _require_room(config: ModelConfig, directory: Path) -> None:
    """Refuse a config that means more layers than there are tensors, before modules are made for them."""
    tensors = len(_weight_files(directory))
    if config.num_hidden_layers > tensors:
        raise UserError(
            f"{directory}: config.json means {config.num_hidden_layers} layers (num_hidden_layers), but there are"
            f" {tensors} tensors"
        )


def _load_weights(
    model: Transformer, directory: Path, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Fill a model made on the meta device; every parameter must be there, in its shape, and nothing else."""
    files = _weight_files(directory)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    # A tied model may still carry the copy that tying made, and older ones the rotary buffer.
    unused = [k for k in files if k.endswith("rotary_emb.inv_freq")]
    if model.config.tie_word_embeddings:
        unused.append("lm_head.weight")
    found = files.keys() - set(unused)
    if missing := sorted(expected.keys() - found):
        raise UserError(f"{directory}: no tensor {missing[0]!r} among its weights ({len(missing)} missing)")
    if extra := sorted(found - expected.keys()):
        hint = "; it is a reward model, not a language model" if "score.weight" in extra else ""
        raise UserError(
            f"{directory}: tensor {extra[0]!r} has no place in this model ({len(extra)} such){hint}"
        )
    tensors = {}
    for file in sorted(set(files.values())):
        with _open_safetensors(file) as handle:
            for name in (name for name, home in files.items() if home == file and name in expected):
                if name not in handle.keys():
                    raise UserError(f"{file}: tensor {name!r} is not in it, though the index says so")
                shape = tuple(handle.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise UserError(
                        f"{file}: tensor {name!r} has shape {shape}; config.json means {expected[name]}"
                    )
                kind = handle.get_slice(name).get_dtype()
                if kind not in FLOATS:
                    raise UserError(
                        f"{file}: tensor {name!r} holds {kind}; {', '.join(FLOATS)} are read (not quantized weights)"
                    )
                tensors[name] = handle.get_tensor(name).to(device, dtype)
    model.load_state_dict(tensors, strict=True, assign=True)


def _weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    if (directory / WEIGHTS).is_file():
        with _open_safetensors(directory / WEIGHTS) as handle:
            return {name: directory / WEIGHTS for name in handle.keys()}
    if not (directory / INDEX).is_file():
        hint = "; .bin weights are pickles and are not read" if any(directory.glob("*.bin")) else ""
        raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there{hint}")
    try:
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = {name: directory / file for name, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{directory / INDEX}: not an index of shards ({error!r})") from None
    for file in set(files.values()):
        # By name, not resolved: in Hugging Face's download cache every file is a link to elsewhere.
        if file.parent != directory or not file.is_file():
            raise UserError(f"{directory / INDEX}: names {file.name!r}, which is not a file in {directory}")
    return files


def _open_safetensors(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file ({error})") from None
