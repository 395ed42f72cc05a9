"""What the two scripts really apply: every gradient and weight at the moment of each optimizer step."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

MAKES_THE_OPTIMIZER = "adamw"  # the name in both scripts that is called with (model, optim)


class Step(NamedTuple):
    weights: dict[str, Tensor]  # by parameter name, before the step
    gradients: dict[str, Tensor]  # after clipping; zeros where a parameter has none
    passes: int  # backward passes, one per micro-batch


def applied_gradients(
    main: Callable[[list[str]], None], argv: list[str], after_step=lambda: None
) -> list[Step]:
    """Runs `main(argv)` of a script and returns its optimizer steps; calls `after_step` after each."""
    steps: list[Step] = []
    passes = 0
    make_optimizer = main.__globals__[MAKES_THE_OPTIMIZER]
    backward = Tensor.backward

    def counted_backward(*args, **kwargs):
        nonlocal passes
        passes += 1
        backward(*args, **kwargs)

    def watched_optimizer(model, optim):
        optimizer = make_optimizer(model, optim)
        take_step = optimizer.step

        def step():
            nonlocal passes
            named = dict(model.named_parameters())
            gradients = {
                n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()
            }
            steps.append(Step({n: p.detach().clone() for n, p in named.items()}, gradients, passes))
            passes = 0
            take_step()
            after_step()

        optimizer.step = step
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(main.__globals__, MAKES_THE_OPTIMIZER, watched_optimizer)
        patch.setattr(Tensor, "backward", counted_backward)
        main(argv)
    return steps


def norm(gradients: dict[str, Tensor]) -> float:
    """The length of all gradients together, as one vector."""
    return sum(float(gradient.square().sum()) for gradient in gradients.values()) ** 0.5
