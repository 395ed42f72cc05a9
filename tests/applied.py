"""What the two scripts really apply: every gradient and weight at the moment of each optimizer step."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Step(NamedTuple):
    weights: dict[str, Tensor]  # by parameter name, before the step
    gradients: dict[str, Tensor]  # after clipping; zeros where a parameter has none
    passes: int  # backward passes, one per micro-batch


def applied_gradients(
    main: Callable[[list[str]], None], argv: list[str], after_step=lambda: None
) -> list[Step]:
    """Runs `main(argv)` of a script and returns its optimizer steps; calls `after_step` after each."""
    steps, passes = [], []
    make_optimizer, backward = main.__globals__["adamw"], Tensor.backward

    def counted_backward(*args, **kwargs):
        passes.append(1)
        backward(*args, **kwargs)

    def watched_optimizer(model, optim):
        def before_step(*_):
            named = dict(model.named_parameters())
            gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
            copies = ({n: x.detach().clone() for n, x in tensors.items()} for tensors in (named, gradients))
            steps.append(Step(*copies, len(passes)))
            passes.clear()

        optimizer = make_optimizer(model, optim)
        optimizer.register_step_pre_hook(before_step)
        optimizer.register_step_post_hook(lambda *_: after_step())
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(main.__globals__, "adamw", watched_optimizer)
        patch.setattr(Tensor, "backward", counted_backward)
        main(argv)
    return steps
