"""Two steps of training on fake CUDA tensors, for every loss: a tensor that stays on the CPU, or an operation
for which the CPU would wait for the GPU in the middle of a micro-batch, is an error here.

    python tests/gpu/fake_step.py

Nothing is computed: what is shown is that devices and dtypes fit, on a machine without a GPU.
"""

import fakecuda  # noqa: F401  # isort: skip

import sys
import traceback
from dataclasses import replace

import numpy as np
import torch
import torch.nn.attention.flex_attention as flex_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from minidpo.data import PairTokens
from minidpo.log import Means
from minidpo.losses import LOSSES, BradleyTerry
from minidpo.model import ModelConfig, RewardModel, Transformer
from minidpo.model import attention as attention_module
from minidpo.model.lora import add_adapters
from minidpo.sections import LoRASection, OptimSection
from minidpo.training.optim import adamw
from minidpo.training.step import pair_logps, pair_rewards
from tiny import random_pairs

CUDA, KINDS = torch.device("cuda"), dict(attention_module.KINDS)
CONFIG = ModelConfig(512, 256, 128, 2, 4, 2, 64, tie_word_embeddings=True, qkv_bias=True)
PAIRS = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 12, (5, 90), (2, 60)))
# A value that Python reads off a tensor, and shapes that depend on values: the CPU waits until the GPU has them.
WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "item", "equal", "is_nonzero")


class NoWaiting(TorchDispatchMode):
    """An error for what waits, and for a copy from the CPU that is not non-blocking."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = getattr(function, "overloadpacket", function).__name__.rstrip("_")
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        assert name not in WAITING or not any(t.is_cuda for t in tensors), f"{name} waits for the GPU"
        if name == "_to_copy" and "device" in keywords and keywords["device"] != tensors[0].device:
            to = keywords["device"].type
            assert to == "cuda" and keywords.get("non_blocking"), f"a copy to {to} waits for the GPU"
        if name == "copy" and tensors[0].device != tensors[1].device:
            raise AssertionError("copy_ between devices waits for the GPU")
        return function(*arguments, **keywords)


def on_meta(kind: type, lora: bool) -> Transformer:
    with torch.device("meta"):
        model = kind(CONFIG)
        add_adapters(model, LoRASection(rank=8 if lora else 0, base_dtype="bf16"))
    return model


def on_gpu(model: Transformer) -> Transformer:
    weights = {name: torch.empty_like(p, device=CUDA) for name, p in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model


def step(loss, dtype: str, lora: bool = False, checkpointing: bool = False, attention: str = "") -> None:
    attention_module.KINDS.update(KINDS | dict.fromkeys(KINDS if attention else (), attention))
    pairs = replace(PAIRS, ref_logps=np.zeros((12, 2), np.float32), margin=np.ones(12))
    if getattr(loss, "unpaired", False):
        pairs = replace(pairs.unpaired(), ref_logps=np.zeros((24, 1), np.float32))
    rewards = isinstance(loss, BradleyTerry)
    model = on_meta(RewardModel if rewards else Transformer, lora)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = on_gpu(model)
        model.activation_checkpointing = checkpointing
        optimizer, z0 = adamw(model, OptimSection()), torch.zeros((), device=CUDA)
        for _ in range(2):
            totals = Means()
            for indices in np.split(np.arange(12), 2):
                with NoWaiting():
                    if rewards:
                        values = pair_rewards(model, pairs, indices, loss, CUDA, dtype)
                    else:
                        of_batch = z0 if loss.needs_z0 else None
                        values = pair_logps(model, pairs, indices, loss, CUDA, dtype, of_batch)
                    losses = loss(values)
                    (losses.sum() / 12).backward()
                    totals.add(loss.metrics(values, losses))
            totals.all_reduce()
            norm = clip_grad_norm_(model.parameters(), 1.0)
            assert norm.is_cuda and losses.dtype == torch.float32
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        assert states and all(tensor.is_cuda for tensor in states), "AdamW's state is not on the GPU"


def main() -> None:
    # FlexAttention uncompiled: Triton's kernels are the business of compile_kernels.py.
    flex_module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    torch.compiler.set_stance("force_eager")
    attention_module._flex_attention = lambda: flex_module.flex_attention
    attention_module._kernel_options = lambda *_: None
    losses = [loss() for loss in LOSSES.values()] + [BradleyTerry(), BradleyTerry(margin_from_data=True)]
    cases = [(loss, dtype, {}) for loss in losses for dtype in ("bf16", "fp32")]
    for extra in ({"lora": True}, {"checkpointing": True}, {"attention": "sdpa"}, {"attention": "flex"}):
        cases += [(loss, dtype, extra) for loss in (losses[0], losses[-1]) for dtype in ("bf16", "fp32")]
    failed = 0
    for loss, dtype, extra in cases:
        try:
            step(loss, dtype, **extra)
            print("ok    ", loss, dtype, extra or "")
        except Exception as error:
            failed += 1
            traceback.print_exc(limit=-4)
            print("FAILED", loss, dtype, extra or "", error)
    sys.exit(f"{failed} of {len(cases)} failed" if failed else 0)


if __name__ == "__main__":
    main()
