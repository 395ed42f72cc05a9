"""Adapters on disk, in the format of PEFT: adapter_config.json and adapter_model.safetensors.

Our `model.layers.0.mlp.up_proj.lora_A` is `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` there.
"""

import json
from pathlib import Path

from torch import Tensor

from minidpo.distributed import rank, reshard
from minidpo.errors import UserError
from minidpo.files import read_object, require_file, write_file
from minidpo.model.lora import adapted_layers, is_adapter, trained_parameters
from minidpo.model.reward_model import RewardModel
from minidpo.model.tensors import read_about, read_tensors, tensor_files, write_tensors
from minidpo.model.transformer import Transformer
from minidpo.sections import LoRASection

CONFIG, STEM = "adapter_config.json", "adapter_model"
HELP = "adapters of the model: the final/adapter or a checkpoint of a run with [lora], or PEFT's"  # --adapter
SCORE = "base_model.model.score.weight"


def save_adapter(model: Transformer, directory: Path, lora: LoRASection, base: str, of_base: str) -> None:
    """Write the adapters, and a reward model's head; all ranks call it. base: the directory of the frozen
    weights; of_base: its fingerprint."""
    reshard(model)  # As in save_model.
    write_tensors(directory, adapter_tensors(model), STEM, about={"base": of_base})
    if rank() > 0:
        return
    rewards = isinstance(model, RewardModel)
    fields = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if rewards else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_scaled,
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted_layers(model)}),
        "modules_to_save": ["score"] if rewards else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    write_file(directory / CONFIG, json.dumps(fields, indent=2) + "\n")


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """What is trained, by the names in PEFT's files; the tensors themselves, without gradients."""
    return {
        f"base_model.model.{name}" + ".weight" * is_adapter(name): parameter.detach()
        for name, parameter in trained_parameters(model).items()
    }


def adapter_settings(directory: Path) -> LoRASection:
    """What adapter_config.json says, also PEFT's. Raises UserError for what is not known here, unless it has
    tensors of its own, which `load_adapter` refuses."""
    hint = "an adapter is needed, such as the final/adapter of a run with lora.rank"
    for inside in ("adapter", "final/adapter"):
        hint += f"; {directory / inside} is one" * (directory / inside / CONFIG).is_file()
    fields = read_object(file := require_file(directory / CONFIG, hint))
    rank, alpha, targets = (fields.get(name) or 0 for name in ("r", "lora_alpha", "target_modules"))
    numbers = type(rank) is int and rank > 0 and isinstance(alpha, int | float)
    if fields.get("peft_type") != "LORA" or not numbers or not isinstance(targets, list):
        raise UserError(f"{file}: peft_type LORA, r, lora_alpha and a list of target_modules are needed")
    if fields.get("alpha_pattern"):
        raise UserError(f"{file}: alpha_pattern, an alpha per layer, is not known here")
    names = sorted({str(target).rpartition(".")[2] for target in targets})
    return LoRASection(rank, float(alpha), bool(fields.get("use_rslora")), names)


def with_tokenizer(directory: str | Path, adapter: str | Path | None) -> Path:
    """Where the tokenizer of a model is: training may have given its own chat template to the adapter."""
    return Path(adapter if adapter and Path(adapter, "tokenizer.json").is_file() else directory)


def load_adapter(model: Transformer, directory: Path, of_base: str) -> None:
    """Fill the adapters of a model. Raises UserError if the directory's are of other layers, or of another
    base than the one with the fingerprint `of_base`."""
    files = tensor_files(directory, STEM)
    trained = adapter_tensors(model)
    if SCORE not in files:
        trained.pop(SCORE, None)  # That of the base stays.
    if extra := files.keys() - trained.keys():
        hint = "it is of other layers, of another kind of model, or more than LoRA"
        raise UserError(f"{directory}: tensor {min(extra)!r} has no place in this model; {hint}")
    if read_about(files[min(files)]).get("base", of_base) != of_base:
        base = read_object(directory / CONFIG).get("base_model_name_or_path")
        raise UserError(f"{directory}: this adapter was trained on other weights; give its base, {base}")
    for name, value in read_tensors(directory, trained, stem=STEM):
        trained[name].copy_(value)
