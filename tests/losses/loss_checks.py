"""Checks run on every loss: functions of (loss, claims).

A check raises AssertionError where a claim is false. In the claims' equations `p` holds the pairs' numbers,
NumPy arrays (B,) by the names of PairLogps or Rewards, and `s` is the loss, read for its settings.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from minidpo.losses import SATURATED, PairLogps, Rewards

# Tensors this small run many times faster on one thread than on two that share busy cores.
torch.set_num_threads(1)
LOGPS = ("chosen", "rejected", "ref_chosen", "ref_rejected")


@dataclass(frozen=True)
class Claims:
    """What is claimed of a loss. Points and optimum are needed; what is left out is not asked."""

    points: list[tuple[dict, dict, float]]  # settings, a pair, its loss computed by hand
    optimum: tuple[dict, Callable] | str  # settings, world -> log pi (X, Y); or why no optimum is known
    twin: Callable | None = None  # p, s -> the losses again, in NumPy
    gradient: Callable | None = None  # p, s -> the closed form of d loss / d input, by the input's name
    metrics: Callable | None = None  # p, s -> what is logged, without loss and saturated
    fields: type = PairLogps  # or Rewards


def check_points(loss: Any, claims: Claims) -> None:
    """Every point has the loss that was computed by hand. What its settings leave out has the default."""
    for settings, pair, value in claims.points:
        numbers = {name: torch.tensor([number], dtype=torch.float64) for name, number in pair.items()}
        close(type(loss)(**settings)(claims.fields(**numbers)), [value], rtol=0, atol=1e-9)


def check_twin(loss: Any, claims: Claims) -> None:
    """The losses are those of the NumPy twin, whatever the settings."""
    p = draw(claims, 256, scale=300.0)
    for s in (loss, with_numbers(loss, 0.6), with_numbers(loss, 2.0)):
        losses, _ = evaluate(s, tensors(claims, p))
        if claims.twin:
            close(losses, claims.twin(p, s), atol=1e-11)


def check_gradient(loss: Any, claims: Claims) -> None:
    """d loss / d input is the closed form, and 0 where that names no such input; so is `gradient_weights`."""
    p = draw(claims, 64, seed=1)
    for s in (loss, with_numbers(loss, 0.6)):
        _, gradients = evaluate(s, tensors(claims, p))
        if claims.gradient:
            expected = claims.gradient(p, s)
            for name, gradient in gradients.items():
                close(gradient, expected.get(name, np.zeros(64)), says=f"d loss / d {name}")
        if hasattr(s, "gradient_weights"):
            weights = s.gradient_weights(tensors(claims, p))
            for name, weight in zip(LOGPS[: s.responses], weights, strict=True):
                close(-weight, gradients[name], says=f"minus the gradient weight of {name}")


def check_gradcheck(loss: Any, claims: Claims) -> None:
    """First and second derivatives in every input equal finite differences."""
    pairs = tensors(claims, draw(claims, 6, seed=2))
    names = evaluate(loss, pairs)[1]

    def of_inputs(*inputs: Tensor) -> Tensor:
        return loss(pairs._replace(**dict(zip(names, inputs, strict=True))))

    inputs = [getattr(pairs, name) for name in names]
    assert gradcheck(of_inputs, inputs, raise_exception=False), "gradcheck"
    assert gradgradcheck(of_inputs, inputs, raise_exception=False), "gradgradcheck"


def check_alone(loss: Any, claims: Claims) -> None:
    """The loss of a pair is the same alone and in a batch."""
    p = draw(claims, 5, seed=3)
    losses, _ = evaluate(loss, tensors(claims, p))
    for i in range(5):
        one = Pairs(**{name: values[[i]] for name, values in vars(p).items()})
        close(evaluate(loss, tensors(claims, one))[0], losses[[i]], rtol=1e-14, atol=0)


def check_far(loss: Any, claims: Claims) -> None:
    """With log-probs from 0, where p = 1, to -100,000, float32 is finite and agrees with the twin."""
    p = draw(claims, 4096, scale=1e5)
    p = Pairs(**{name: np.round(x, -4) if x.dtype == float else x for name, x in vars(p).items()})
    losses, gradients = evaluate(loss, tensors(claims, p, torch.float32))
    assert all(values.isfinite().all() for values in (losses, *gradients.values())), "not finite"
    if claims.twin:
        close(losses, claims.twin(p, loss), rtol=1e-5, atol=1e-4)


def check_metrics(loss: Any, claims: Claims) -> None:
    """What is logged of each pair. Pair 0 is a tie, which is no win; pair 1 is told apart without a doubt."""
    p = draw(claims, 16, seed=6)
    for name, values in vars(p).items():
        if "rejected" in name:
            values[0] = getattr(p, name.replace("rejected", "chosen"))[0]
            values[1] = {"rejected": -1000.0, "rejected_length": 1}.get(name, values[1])
    for s in (loss, with_numbers(loss, 0.6)):
        losses, _ = evaluate(s, tensors(claims, p))
        found = s.metrics(tensors(claims, p), losses)
        assert all(values.shape == losses.shape for values in found.values()), "one value per pair"
        if claims.metrics:
            expected = {"loss": losses} | claims.metrics(p, s)
            if getattr(s, "saturates", False):
                expected["saturated"] = losses < SATURATED
            assert set(found) == set(expected), set(found) ^ set(expected)
            for name in expected:
                close(found[name], expected[name], says=name)


CHECKS = (check_points, check_twin, check_gradient, check_gradcheck, check_alone, check_far, check_metrics)


def check_unmoved(loss: Any, claims: Claims, change: Callable) -> None:
    """change(p) gives some fields new values, and no loss differs."""
    p = draw(claims, 64, seed=4)
    losses, _ = evaluate(loss, tensors(claims, p))
    moved, _ = evaluate(loss, tensors(claims, Pairs(**vars(p) | change(p))))
    close(moved, losses, rtol=1e-10, atol=1e-10)


# --- what the checks and the claims are made of -------------------------------------------------------------


def draw(claims: Claims, pairs: int, seed: int = 0, scale: float = 40.0) -> Pairs:
    """Random pairs: log-probs in [-scale, 0], rewards and margins in +-scale/8, lengths from 1 to 300."""
    rng = np.random.default_rng(seed)
    p = {name: rng.uniform(-scale, 0, pairs) for name in (*LOGPS, "chosen_logps")}
    if claims.fields is Rewards:
        p |= {name: rng.uniform(-scale / 8, scale / 8, pairs) for name in ("chosen", "rejected", "margin")}
    p |= {name: rng.integers(1, 301, pairs) for name in ("chosen_length", "rejected_length")}
    return Pairs(**{name: p[name] for name in claims.fields._fields if name in p})


def tensors(claims: Claims, p: Pairs, dtype: torch.dtype = torch.float64) -> Any:
    """The pairs as PairLogps or Rewards; all but the lengths have `dtype` and require gradients."""
    lengths = {n: torch.tensor(x) for n, x in vars(p).items() if n.endswith("_length")}
    inputs = {n: torch.tensor(x, dtype=dtype) for n, x in vars(p).items() if n not in lengths}
    return claims.fields(**{n: x.requires_grad_() for n, x in inputs.items()}, **lengths)


def evaluate(loss: Any, pairs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and d loss / d input by the input's name."""
    losses = loss(pairs)
    assert losses.shape == pairs.chosen.shape and losses.dtype == pairs.chosen.dtype, "one loss per pair"
    assert losses.requires_grad, "the loss is cut off from its inputs"
    inputs = {name: x for name, x in pairs._asdict().items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(losses.sum(), list(inputs.values()), materialize_grads=True)
    return losses, dict(zip(inputs, gradients, strict=True))


def with_numbers(loss: Any, factor: float) -> Any:
    """The loss with each nonzero number of its settings changed, so that a loss which ignores one is found
    out."""
    return replace(loss, **{n: factor * x for n, x in vars(loss).items() if isinstance(x, float)})


def close(found: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-12, says: str = "") -> None:
    found, expected = (x.detach().numpy() if isinstance(x, Tensor) else x for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=says)


def sigma(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))


def logistic_loss(z: np.ndarray, e: float) -> np.ndarray:
    """-(1-e) log sigma(z) - e log sigma(-z), where -log sigma(z) = ln(1 + exp(-z))."""
    return (1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)


def pair_metrics(p: Pairs, chosen_reward: np.ndarray, rejected_reward: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "rewards/chosen": chosen_reward,
        "rewards/rejected": rejected_reward,
        "rewards/margins": chosen_reward - rejected_reward,
        "rewards/accuracies": chosen_reward > rejected_reward,
        "logps/chosen": p.chosen,
        "logps/rejected": p.rejected,
        "response_length/chosen": p.chosen_length,
        "response_length/rejected": p.rejected_length,
    }
