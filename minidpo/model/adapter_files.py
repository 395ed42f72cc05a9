"""Adapters on disk, in the format of PEFT: adapter_config.json and adapter_model.safetensors.

Our `model.layers.0.mlp.up_proj.lora_A` is `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` there.
Phi-3's projections are one layer in transformers and several here. PEFT would pass over the adapters of the
latter without a word, so such a file has a type of its own, which PEFT refuses.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from minidpo.distributed import rank, reshard
from minidpo.errors import UserError
from minidpo.files import read_object, replacing_file, require_file
from minidpo.model.lora import is_adapter, trained_parameters
from minidpo.model.reward_model import RewardModel
from minidpo.model.tensors import FUSED, read_about, read_tensors, tensor_files, write_tensors
from minidpo.model.transformer import Transformer
from minidpo.sections import LoRASection

CONFIG, STEM = "adapter_config.json", "adapter_model"
HELP = (
    "adapters of the model: the final/adapter or a checkpoint of a run with [lora], or PEFT's"  # of --adapter
)
OF_PARTS = "LORA_OF_PARTS"  # the type of an adapter of layers that are fused in transformers
SCORE = "base_model.model.score.weight"
# What of PEFT's settings would change the numbers, and the only values that are known here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA", OF_PARTS),
    "bias": ("none", None),
    "modules_to_save": (None, [], ["score"]),
    **dict.fromkeys("use_dora fan_in_fan_out use_qalora lora_bias".split(), (False, None)),
    **dict.fromkeys("rank_pattern alpha_pattern".split(), ({}, None)),
    **dict.fromkeys("layers_to_transform target_parameters trainable_token_indices".split(), (None, [])),
}


def save_adapter(model: Transformer, directory: Path, lora: LoRASection, base: str, of_base: str) -> None:
    """Write the adapters, and a reward model's head. base: the directory of the frozen weights; of_base: its
    fingerprint. All ranks call it."""
    reshard(model)  # As in save_model.
    write_tensors(directory, adapter_tensors(model), STEM, about={"base": of_base})
    if rank() > 0:
        return
    rewards = isinstance(model, RewardModel)
    fields = {
        "peft_type": OF_PARTS if model.config.fused_projections else "LORA",
        "task_type": "SEQ_CLS" if rewards else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_scaled,
        "target_modules": lora.targets,
        "modules_to_save": ["score"] if rewards else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    with replacing_file(directory / CONFIG) as temporary:
        temporary.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """What is trained, by the names in PEFT's files; the tensors themselves, without gradients."""
    return {
        f"base_model.model.{name}" + ".weight" * is_adapter(name): parameter.detach()
        for name, parameter in trained_parameters(model).items()
    }


def adapter_settings(directory: Path) -> LoRASection:
    """What adapter_config.json says, also PEFT's. Raises UserError for what is not known here."""
    file = require_file(
        directory / CONFIG, "an adapter is needed, such as the final/adapter of a run with lora.rank"
    )
    fields = read_object(file)
    for name, values in NEUTRAL.items():
        if (value := fields.get(name, values[0])) not in values:
            raise UserError(f"{file}: {name} is {value!r}; {values[0]!r} alone is known here")
    rank, alpha, targets = fields.get("r"), fields.get("lora_alpha"), fields.get("target_modules")
    if (
        type(rank) is not int
        or rank < 1
        or not isinstance(alpha, int | float)
        or not isinstance(targets, list)
    ):
        raise UserError(f"{file}: r, lora_alpha and a list of target_modules are needed")
    names = sorted({str(target).rpartition(".")[2] for target in targets})
    if fused := FUSED.keys() & names:
        parts = ", ".join(FUSED[min(fused)])
        raise UserError(
            f"{file}: {min(fused)} is {parts} here; merge the adapter first (peft: merge_and_unload)"
        )
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
