"""From a gradient to the weights, in both scripts: clipping, the learning rate, AdamW and its state."""

import pytest
import torch

from applied import applied_gradients
from minidpo.sections import OptimSection
from minidpo.training.optim import adamw, learning_rate, optimizer_tensors
from runs import final, metrics, steps

HALF = 0.5**0.5  # cos(pi/4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(schedule="constant", warmup_steps=4), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (dict(schedule="linear", warmup_steps=2), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (dict(schedule="cosine", warmup_steps=1), [1.0, 1.0, (1 + HALF) / 2, 0.5, (1 - HALF) / 2]),
        # 0.25 * 6 = 1.5 steps, rounded up to 2
        (dict(schedule="linear", warmup_ratio=0.25), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_learning_rate(settings, expected):
    """It climbs linearly to its peak, and where it falls it would be zero one step after the last."""
    optim, steps = OptimSection(lr=1.0, **settings), len(expected)
    assert [learning_rate(step, steps, optim) for step in range(steps)] == pytest.approx(expected)


def test_clipping(five_pairs, script, tmp_path):
    """Longer gradients are shortened to grad_clip, shorter ones left alone; 0 means no clipping."""

    def first_step(clip: float):
        """The first step's gradients, and the norm that is logged for them: the one before clipping."""
        keys = [f"--optim.grad_clip={clip}", f"--run.out={tmp_path / str(clip)}"]
        step, *_ = applied_gradients(script.main, [*five_pairs, *keys])
        return step.gradients, steps(metrics(tmp_path / str(clip)))[0]["grad_norm"]

    plain, logged = first_step(0)
    whole = torch.cat([gradient.flatten() for gradient in plain.values()])
    assert logged == pytest.approx(whole.norm().item(), rel=1e-5) and logged > 0.1
    clipped, logged_of_clipped = first_step(0.01)
    assert logged_of_clipped == pytest.approx(logged, rel=1e-5)
    alone, _ = first_step(2 * logged)
    for name, gradient in plain.items():
        torch.testing.assert_close(clipped[name], gradient * (0.01 / logged), rtol=1e-3, atol=1e-9)
        assert torch.equal(alone[name], gradient)


def test_adamw(five_pairs, script, tmp_path):
    """Weights move by AdamW's equation at the schedule's rate; weight decay is for matrices only."""
    beta1, beta2, eps, decay = 0.8, 0.95, 1e-3, 0.1
    keys = f"--optim.beta1={beta1} --optim.beta2={beta2} --optim.eps={eps} --optim.weight_decay={decay}"
    keys += " --optim.schedule=linear --optim.warmup_steps=2 --optim.max_steps=5 --optim.epochs=5"
    applied = applied_gradients(script.main, [*five_pairs, *keys.split()])
    rates = [step["lr"] for step in steps(metrics(tmp_path / "out"))]
    assert rates == pytest.approx([1e-2 * share for share in (1 / 2, 1, 1, 2 / 3, 1 / 3)])
    after = [step.weights for step in applied[1:]] + [final(tmp_path / "out")]
    for name in applied[0].weights:
        first = second = 0.0
        for t, (step, lr) in enumerate(zip(applied, rates, strict=True), start=1):
            weight, gradient = step.weights[name], step.gradients[name]
            first = beta1 * first + (1 - beta1) * gradient
            second = beta2 * second + (1 - beta2) * gradient**2
            decayed = weight * (1 - lr * decay) if weight.ndim == 2 else weight
            moved = decayed - lr * (first / (1 - beta1**t)) / ((second / (1 - beta2**t)).sqrt() + eps)
            if name in after[t - 1]:  # the final reward model has no lm_head
                torch.testing.assert_close(after[t - 1][name], moved, rtol=1e-5, atol=1e-6)


def test_state():
    """Without a gradient a weight stays, undecayed, and its state is zeros, from which it can go on.

    In a first step m/(1-b1) = g and v/(1-b2) = g^2: a weight moves by lr g / (|g| + eps) = 0.1 sign(g), here
    0.1.
    """
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    weight, bias = (parameter.detach().clone() for parameter in model[1].parameters())
    optimizer = adamw(model, OptimSection(lr=0.1, weight_decay=0.5))
    assert not any(tensor.any() for tensor in optimizer_tensors(model, optimizer).values())
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer_tensors(model, optimizer)
    assert torch.equal(model[1].weight, weight)
    assert [name[9:] for name in state if name.startswith("1.weight")] == ["exp_avg", "exp_avg_sq", "step"]
    assert state["0.weight/step"] == 1 and state["1.weight/step"] == 0 and not state["1.weight/exp_avg"].any()
    model[1](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), weight * (1 - 0.1 * 0.5) - 0.1)
    torch.testing.assert_close(model[1].bias.detach(), bias - 0.1)
