"""Learning rate as a pure function of the step, and which parameters decay."""

import pytest
import torch

from minidpo.optim import learning_rate, make_optimizer
from minidpo.sections import OptimSection
from tiny import tiny_model


def rates(steps: int, **settings) -> list[float]:
    optim = OptimSection(lr=1.0, **settings)
    return [learning_rate(step, steps, optim) for step in range(steps)]


def test_warmup_climbs_linearly_to_the_peak():
    assert rates(10, schedule="constant", warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


def test_linear_falls_from_the_peak_and_would_be_zero_one_step_after_the_last():
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_down_in_the_middle():
    values = rates(8, schedule="cosine")
    assert values[0] == 1.0
    assert values[4] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)


def test_weight_decay_spares_norms_and_biases():
    model = tiny_model(qkv_bias=True)
    optimizer = make_optimizer(model, OptimSection(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim == 2), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_one_step_is_adamws_equation():
    # first step of Adam: m/(1-b1) = g, v/(1-b2) = g^2, so each weight moves by lr * g / (|g| + eps) = 0.1 sign(g)
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer, OptimSection(lr=0.1, weight_decay=0.5))
    layer(torch.tensor([[1.0, -3.0]])).sum().backward()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(layer.weight.detach(), expected)
