"""AdamW, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from minidpo.sections import OptimSection


class AdamW:
    """Adam with decoupled weight decay (Kingma & Ba 2015; Loshchilov & Hutter 2019), over all parameters of a model.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w <- w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)

    g: the gradient of a parameter w; t: the steps taken, this one included. Weight decay is for matrices only: norms
    and biases have no size to keep small. The numbers are those of torch.optim.AdamW, whose kernel this calls. That
    class would import PyTorch's compiler first, which takes as long as importing PyTorch.
    """

    def __init__(self, model: nn.Module, optim: OptimSection) -> None:
        self._parameters, self._optim = dict(model.named_parameters()), optim
        self.lr = optim.lr
        # From the first step on, by NAME/exp_avg: m, NAME/exp_avg_sq: v, NAME/step: t.
        self.state: dict[str, Tensor] = {}

    def like(self) -> dict[str, Tensor]:
        """The names of the state, each with a tensor that has its shape, dtype, device and sharding."""
        like: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            like |= {f"{name}/exp_avg": parameter, f"{name}/exp_avg_sq": parameter}
            like[f"{name}/step"] = torch.zeros((), device=parameter.device)
        return like

    @torch.no_grad()
    def step(self) -> None:
        """One step at `lr`, of the parameters that have a gradient."""
        self.state = self.state or {name: torch.zeros_like(tensor) for name, tensor in self.like().items()}
        optim = self._optim
        for matrices, weight_decay in ((True, optim.weight_decay), (False, 0.0)):
            moving = [
                (name, p, p.grad)
                for name, p in self._parameters.items()
                if p.grad is not None and (p.ndim >= 2) == matrices
            ]
            first, second, steps = (
                [self.state[f"{name}/{kind}"] for name, _, _ in moving]
                for kind in ("exp_avg", "exp_avg_sq", "step")
            )
            # Fused: one kernel a step instead of several a tensor; it exists on CPU and CUDA.
            adamw(
                [p for _, p, _ in moving], [gradient for _, _, gradient in moving], first, second, [], steps,
                lr=self.lr, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps, weight_decay=weight_decay,
                fused=True, amsgrad=False, maximize=False,
            )  # fmt: skip

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None


def learning_rate(step: int, total_steps: int, optim: OptimSection) -> float:
    """The rate of step `step` (from 0): linear warm-up to lr, then constant, or falling to 0 at total_steps."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.lr * ((1 + math.cos(math.pi * done)) / 2 if optim.schedule == "cosine" else 1 - done)
