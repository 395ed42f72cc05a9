"""AdamW's parameter groups and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from minidpo.sections import OptimSection


def make_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """AdamW over all parameters; weight decay on matrices only: norms and biases have no size to keep small."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One kernel a step instead of several a tensor; it exists on CPU and CUDA.
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def learning_rate(step: int, total_steps: int, optim: OptimSection) -> float:
    """The rate of step `step` (from 0): linear warm-up to lr, then constant, or falling to 0 at total_steps."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.lr * ((1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done)
