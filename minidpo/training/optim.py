"""AdamW, its state by parameter name, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from minidpo.model.lora import trained_parameters
from minidpo.sections import OptimSection


def adamw(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019), of what is trained.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)

    g: the gradient of a parameter w; t: the number of the step, from 1.
    """
    # Matrices only: the weights of norms are scales around 1, and would be drawn to 0. Adapters are matrices:
    # their decay draws W + B A to the frozen W, not to 0.
    trained = trained_parameters(model).values()
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused: one kernel per step instead of several per parameter, on CPU as on CUDA.
    return torch.optim.AdamW(groups, optim.lr, (optim.beta1, optim.beta2), optim.eps, fused=True)


def learning_rate(step: int, total_steps: int, optim: OptimSection) -> float:
    """The rate of step `step` (from 0): linear warm-up to lr, then constant or falling to 0 at the end."""
    # One of the two settings is 0. Rounded up, as in transformers.
    warmup_steps = optim.warmup_steps or math.ceil(optim.warmup_ratio * total_steps)
    # The first step has the rate lr / warmup_steps. transformers is one step behind: its first step has 0.
    if step < warmup_steps:
        return optim.lr * (step + 1) / warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    # done: the share of the steps after warm-up that have been taken.
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return optim.lr * ((1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's own m, v and t: NAME/exp_avg, NAME/exp_avg_sq and NAME/step of every NAME that is
    trained. The next step goes on from what is copied into these tensors."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in trained_parameters(model).items():
        state = optimizer.state[parameter]
        if not state:  # It has not taken a step yet.
            state |= {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.zeros((), device=parameter.device)
        tensors |= {f"{name}/{key}": value for key, value in state.items()}
    return tensors
