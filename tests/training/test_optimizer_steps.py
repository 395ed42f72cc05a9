"""What happens to a gradient between backward and the weights, in both scripts: clipping, the rate, AdamW."""

from math import cos, pi

import pytest
import torch

import train_dpo
import train_rm
from applied import applied_gradients, norm
from runs import final, metrics, steps

SCRIPTS = pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])


def first_step(script, arguments, tmp_path, clip: float):
    """The first step's gradients under this grad_clip, and the norm that was logged for it."""
    out = tmp_path / f"clip-{clip}"
    applied = applied_gradients(script.main, [*arguments, f"--optim.grad_clip={clip}", f"--run.out={out}"])
    return applied[0].gradients, steps(metrics(out))[0]["grad_norm"]


@SCRIPTS
def test_gradients_are_scaled_to_grad_clip_and_logged_as_they_were_before(five_pairs, script, tmp_path):
    plain, plain_logged = first_step(script, five_pairs, tmp_path, 0)
    clipped, clipped_logged = first_step(script, five_pairs, tmp_path, 0.01)
    before = norm(plain)
    assert before > 0.1
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)
    for name, gradient in plain.items():  # all by one factor: the direction stays
        torch.testing.assert_close(clipped[name], gradient * (0.01 / before), rtol=1e-3, atol=1e-9)
    assert plain_logged == pytest.approx(before, rel=1e-5)
    assert clipped_logged == pytest.approx(before, rel=1e-5)


@SCRIPTS
def test_a_gradient_below_grad_clip_is_left_alone_and_0_means_no_clipping(five_pairs, script, tmp_path):
    plain, logged = first_step(script, five_pairs, tmp_path, 0)
    large, _ = first_step(script, five_pairs, tmp_path, 2 * logged)
    assert logged > 0.1
    assert all(torch.equal(large[name], gradient) for name, gradient in plain.items())


@SCRIPTS
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [0.5, 1, 1, (1 + cos(pi / 4)) / 2, 1 / 2, (1 + cos(3 * pi / 4)) / 2]),
    ],
)
def test_the_logged_rate_is_the_schedules_step_by_step(five_pairs, script, schedule, expected, tmp_path):
    """Two steps of warm-up, then four that fall to zero one step after the last."""
    arguments = f"--optim.schedule={schedule} --optim.warmup_steps=2 --optim.max_steps=6 --optim.epochs=6"
    script.main([*five_pairs, *arguments.split()])
    logged = [step["lr"] for step in steps(metrics(tmp_path / "out"))]
    assert logged == pytest.approx([1e-2 * share for share in expected])


@SCRIPTS
def test_weights_move_by_adamws_equation_at_the_logged_rate(five_pairs, script, tmp_path):
    """With all the keys of [optim] that the equation reads; weight decay is for matrices only."""
    beta1, beta2, eps, decay = 0.8, 0.95, 1e-3, 0.1
    keys = f"--optim.beta1={beta1} --optim.beta2={beta2} --optim.eps={eps} --optim.weight_decay={decay}"
    keys += " --optim.schedule=linear --optim.warmup_steps=2 --optim.max_steps=5 --optim.epochs=5"
    applied = applied_gradients(script.main, [*five_pairs, *keys.split()])
    rates = [step["lr"] for step in steps(metrics(tmp_path / "out"))]
    after = [step.weights for step in applied[1:]] + [final(tmp_path / "out")]
    assert len(applied) == len(rates) == 5

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
