"""AdamW is torch's, without what torch's class imports; the learning rate is a pure function of the step."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minidpo.optim import AdamW, learning_rate
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


def test_many_steps_are_those_of_torchs_adamw_and_weight_decay_spares_norms_and_biases():
    models = [tiny_model(qkv_bias=True) for _ in range(2)]
    ours = AdamW(models[0], OptimSection(lr=1e-2, weight_decay=0.1, beta2=0.9))
    parameters = list(models[1].parameters())
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.9),
        fused=True,
    )
    for step in range(5):
        ours.lr = theirs.param_groups[0]["lr"] = theirs.param_groups[1]["lr"] = 1e-2 / (step + 1)
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(torch.tensor([[4, 5, 6 + step]])).logsumexp(-1).sum().backward()
            optimizer.step()
        for mine, other in zip(models[0].parameters(), parameters, strict=True):
            assert torch.equal(mine, other)


def test_a_parameter_without_a_gradient_stays():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    before = model[1].weight.detach().clone()
    optimizer = AdamW(model, OptimSection(lr=0.1, weight_decay=0.5))
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before) and optimizer.state["1.weight/step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_dpo", "train_rm"])
def test_one_process_trains_without_importing_the_compiler(config, script):
    """It takes as long to import as PyTorch itself, before the first step."""
    code = f"import sys, {script}; {script}.main(sys.argv[1:]); sys.exit('torch._dynamo' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code, *config(run__dtype='"bf16"')],
        cwd=Path(__file__).parents[1],
        capture_output=True,
    )
    assert ended.returncode == 0, ended


def test_one_step_is_adamws_equation():
    # first step of Adam: m/(1-b1) = g, v/(1-b2) = g^2, so each weight moves by lr * g / (|g| + eps) = 0.1 sign(g)
    layer = torch.nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    optimizer = AdamW(layer, OptimSection(lr=0.1, weight_decay=0.5))
    layer(torch.tensor([[1.0, -3.0]])).sum().backward()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(layer.weight.detach(), expected)
