"""AdamW follows its equation and goes on from saved state; the learning rate is a function of the step."""

import copy

import pytest
import torch

from minidpo.sections import OptimSection
from minidpo.training.optim import adamw, learning_rate, load_optimizer_tensors, optimizer_tensors
from tiny import tiny_model


def take_step(model: torch.nn.Module, optimizer: torch.optim.AdamW, token: int) -> None:
    optimizer.zero_grad()
    model(torch.tensor([[4, 5, token]])).logsumexp(-1).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(schedule="constant", warmup_steps=4), [0.25, 0.5, 0.75] + [1.0] * 7),
        (dict(schedule="linear", warmup_steps=2), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (dict(schedule="cosine"), [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
    ],
)
def test_learning_rate(settings, expected):
    """It climbs linearly to its peak, and where it falls it would be zero one step after the last."""
    optim, steps = OptimSection(lr=1.0, **settings), len(expected)
    assert [learning_rate(step, steps, optim) for step in range(steps)] == pytest.approx(expected)


def test_first_step_is_the_equation():
    """At first m/(1-b1) = g and v/(1-b2) = g^2: each weight moves by lr g / (|g| + eps) = 0.1 sign(g).

    The matrix is decayed before, the bias is not.
    """
    layer = torch.nn.Linear(2, 1)
    weight, bias = (parameter.detach().clone() for parameter in layer.parameters())
    optimizer = adamw(layer, OptimSection(lr=0.1, weight_decay=0.5))
    layer(torch.tensor([[1.0, -3.0]])).sum().backward()
    optimizer.step()
    moved = weight * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(layer.weight.detach(), moved)
    torch.testing.assert_close(layer.bias.detach(), bias - 0.1)


def test_many_steps_and_settings():
    """All settings of the config reach the optimizer; norms and biases are spared the weight decay."""
    models = [tiny_model(qkv_bias=True) for _ in range(2)]
    ours = adamw(models[0], OptimSection(lr=1e-2, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6))
    parameters = dict(models[1].named_parameters())
    spared = [p for name, p in parameters.items() if name.endswith(("norm.weight", "bias"))]
    decayed = [p for name, p in parameters.items() if not name.endswith(("norm.weight", "bias"))]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    assert spared and decayed
    for step in range(5):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            take_step(model, optimizer, 6 + step)
    for mine, other in zip(models[0].parameters(), parameters.values(), strict=True):
        torch.testing.assert_close(mine, other)


def test_state_by_name_goes_on_bit_for_bit():
    """Steps after a round trip through `optimizer_tensors` are those of an optimizer that went on."""
    optim = OptimSection(lr=1e-2, weight_decay=0.1)
    model = tiny_model()
    optimizer = adamw(model, optim)
    assert not any(tensor.any() for tensor in optimizer_tensors(model, optimizer).values())
    for step in range(3):
        take_step(model, optimizer, 6 + step)
    resumed = copy.deepcopy(model)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    names = {f"{name}/{k}" for name, _ in model.named_parameters() for k in ("exp_avg", "exp_avg_sq", "step")}
    assert saved.keys() == names
    other = adamw(resumed, optim)
    load_optimizer_tensors(resumed, other, saved)
    for step in range(3):
        take_step(model, optimizer, 9 + step)
        take_step(resumed, other, 9 + step)
    for mine, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_parameter_without_gradient_stays():
    """Not even weight decay moves it; its state is zeros, and it can take its first step after a resume."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = model[1].weight.detach().clone()
    optimizer = adamw(model, OptimSection(lr=0.1, weight_decay=0.5))
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer_tensors(model, optimizer)
    assert torch.equal(model[1].weight, before)
    assert state["0.weight/step"] == 1 and state["1.weight/step"] == 0 and not state["1.weight/exp_avg"].any()

    load_optimizer_tensors(model, optimizer, state)
    model[1](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before * 0.95 - 0.1)
