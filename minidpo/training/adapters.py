"""What a run with adapters does besides: it settles their precision, and tells what final/ in bf16 costs."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minidpo.config import DPOConfig, RewardConfig
from minidpo.data import PairTokens
from minidpo.distributed import full_tensor, reshard, shard_like
from minidpo.errors import UserError
from minidpo.files import read_object
from minidpo.log import print0
from minidpo.model import RewardModel, Transformer, read_config
from minidpo.model.lora import adapted_layers, adapters_off, add_adapters
from minidpo.training.scoring import all_logps, all_rewards

FEW = 16  # pairs on which the cost of rounding is measured


def settle_lora(config: DPOConfig | RewardConfig, device: torch.device) -> None:
    """Decide what lora.base_dtype = "auto" means on `device`, and say what is rounded. Frozen weights in bf16
    are a UserError where products are in float32: each would keep a float32 copy for the backward pass."""
    lora, dtype = config.lora, config.run.dtype
    if not lora.rank:
        return
    with torch.device("meta"):  # Fail now, on a model without weights, if a target is no layer.
        add_adapters(Transformer(read_config(Path(config.model.path))), lora)
    if lora.base_dtype == "bf16" and dtype == "fp32":
        given = config.as_set("lora", "base_dtype")
        raise UserError(f'{given} needs run.dtype = "bf16"; with run.dtype = "fp32" give "fp32"')
    if lora.base_dtype == "auto":
        half = dtype == "bf16" and device.type == "cuda"
        config.lora = replace(lora, base_dtype="bf16" if half else "fp32")
    fields = read_object(Path(config.model.path, "config.json"))
    if config.lora.base_dtype == "bf16" and "float32" in (fields.get("dtype"), fields.get("torch_dtype")):
        what = f"the float32 weights of {config.model.path} are held in bf16, and are rounded in final/ too"
        print0(f"lora.base_dtype: {what}; fp32 keeps them as they are, in twice the memory")


@torch.no_grad()
def tell_rounding(
    config: DPOConfig | RewardConfig, model: Transformer, pairs: PairTokens, device: torch.device
) -> None:
    """If final/ was merged in bf16, say how far it is from the adapters, on the first few `pairs`. `model` is
    merged and rounded in place, because two models may not fit in memory."""
    if not config.lora.rank or config.lora.final_dtype != "bf16":
        return
    few = pairs.select(np.arange(min(FEW, len(pairs))))
    rewards = isinstance(model, RewardModel)
    compute = all_rewards if rewards else all_logps
    values = partial(compute, model, few, config.optim.micro_tokens, device, "fp32")
    before = values()
    reshard(model)  # What is gathered now is a copy.
    for layer in adapted_layers(model).values():
        merged = layer.merge(full_tensor(layer.weight))
        layer.weight.copy_(shard_like(merged.bfloat16(), layer.weight))
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    with adapters_off(model):
        change = np.abs(values() - before)
    what = f"{'a reward' if rewards else 'log pi(response), in nats,'} by {change.mean():.2g} on average"
    if not rewards:
        # Of models that are much alike, KL is half the mean square of the difference of log-probs.
        what += f", a KL of about {(change**2).mean() / 2:.2g}"
    print0(f"final/ in bf16 changes {what}, on {len(few)} pairs; lora.final_dtype = fp32 changes nothing")
