"""LoRA: frozen linear layers, each with a trained addition of low rank (Hu et al. 2021, 2106.09685, Eq. 3).

    y = W x + b + s B A x       s = alpha / r; rank_scaled: alpha / sqrt(r) (Kalajdzievski 2023, 2312.03732)

    W (out, in), b (out,)   frozen, in bf16 or float32
    A (r, in)               trained, float32; begins at U(-1, 1) / sqrt(in), as in the authors' code
    B (out, r)              trained, float32; begins at 0, so that y = W x + b

Instead of out * in numbers, r * (out + in) are trained, and only they have gradients and moments. With
adapters off, the model is its own reference. There is no dropout of x, which the authors' code offers: at
step 0 the policy must equal its reference exactly, and margins must not depend on chance.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpo.distributed import full_tensor
from minidpo.errors import UserError
from minidpo.model.transformer import Transformer
from minidpo.sections import LoRASection

# Phi-3 has one layer for several, which the name of any of them means.
FUSED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
FUSED |= dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")


class FrozenLinear(nn.Module):
    """y = W x + b with the parameters of `linear`, which are frozen. W may be bf16 where x is float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # under the names that files have for them

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class LoRALinear(FrozenLinear):
    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(linear)
        (width_out, width_in), device = linear.weight.shape, linear.weight.device
        # Adapters in float32 even if W is bf16: a bf16 weight would round most updates of AdamW away.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.scale, self.on = scale, True
        self.lora_A = nn.Parameter(torch.empty(rank, width_in, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(width_out, rank, dtype=dtype, device=device))
        # On the meta device there are no numbers yet; the checkpoint's are loaded later.
        if not self.weight.is_meta:
            self.lora_A.data.copy_(fresh_adapter("lora_A", self.lora_A))
            self.lora_B.data.copy_(fresh_adapter("lora_B", self.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        # From right to left: B A itself would be as large as W.
        return y + self.scale * _linear(_linear(x, self.lora_A), self.lora_B) if self.on else y

    def merge(self, weight: Tensor) -> Tensor:
        """W + s B A in float32 or better. weight: the whole of W, which may be sharded here."""
        a, b = full_tensor(self.lora_A.detach()), full_tensor(self.lora_B.detach())
        return weight.to(a.dtype) + self.scale * (b @ a)


def add_adapters(model: Transformer, lora: LoRASection) -> None:
    """Freeze `model`, in bf16 if that is lora.base_dtype, and give the layers named by lora.targets A and B.

    With rank 0 nothing happens. A reward model's head is trained in full. The model may have no weights yet.
    Raises UserError for a target that is no linear layer.
    """
    if not lora.rank:
        return
    linears = {name: m for name, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)}
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in linears)
    # A target may be one of the layers that a fused layer holds.
    targets = {target if target in kinds else FUSED.get(target, target) for target in lora.targets}
    if unknown := targets - kinds.keys():
        there = ", ".join(kinds)
        raise UserError(f"lora.targets: no linear layer is called {min(unknown)!r}; there are {there}")
    for part in (model.model, model.lm_head):
        if part is not None:
            part.requires_grad_(False)
            if lora.base_dtype == "bf16":
                part.to(torch.bfloat16)
    # Replace each linear layer of the decoder; those that are not adapted stay frozen.
    scale = lora.alpha / (lora.rank**0.5 if lora.rank_scaled else lora.rank)
    for name, linear in linears.items():
        parent, _, kind = name.rpartition(".")
        layer = LoRALinear(linear, lora.rank, scale) if kind in targets else FrozenLinear(linear)
        model.model.layers.get_submodule(parent).add_module(kind, layer)


def fresh_adapter(name: str, like: Tensor) -> Tensor:
    """What A (by its name) begins with, drawn on the CPU from torch's generator, or B: whole, in float32."""
    if not name.endswith("lora_A"):
        return torch.zeros(like.shape)
    return torch.empty(like.shape).uniform_(-1, 1) * like.shape[1] ** -0.5


def is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Those with an adapter, by name; none where all weights are trained."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, or the adapters and a reward head, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this block `model` computes what its frozen weights do, bit for bit: the reference."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Autocast casts by itself. Without it, in a sampled evaluation, float32 inputs meet weights in bf16.
    if not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)
