"""The checks: each puts one kind of claim about a loss to the test, functions of (loss, claims).

A check returns what it looked at and the greatest error, raises `Refuted` with the first counterexample, or
`NotAsked` where nothing of its kind is claimed. Its docstring is the claim.
"""

from collections.abc import Callable
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from minidpo.losses import SATURATED
from minidpo.verify.claims import LOGPS, Claims
from minidpo.verify.draws import (
    NotAsked,
    Refuted,
    compare,
    draw,
    evaluate,
    require_finite,
    shown,
    swapped,
    tensors,
    with_numbers,
    with_settings,
)
from minidpo.verify.exact_train import train_to_convergence
from minidpo.verify.exact_world import make_world, total_variation
from minidpo.verify.stranger import Stranger

BF16_ROUNDING = 2.0**-8


Figure = tuple[str, float]  # what was looked at, and the greatest error
Check = Callable[[Any, Claims], Figure]


def check_points(loss: Any, claims: Claims) -> Figure:
    """every loss computed by hand"""
    errors = []
    for settings, pair, value in claims.points:
        configured = with_settings(loss, settings)
        if configured is not None:
            p = Pairs(**{n: np.array([x], bool if isinstance(x, bool) else float) for n, x in pair.items()})
            losses = configured(tensors(claims, p))
            errors.append(compare(losses, [value], p, 0, 1e-9, says=f"{shown(configured)}: the loss"))
    if not errors:
        raise NotAsked
    return f"{len(errors)} points", max(errors)


def check_twin(loss: Any, claims: Claims) -> Figure:
    """the same equation in NumPy, and at other settings"""
    p = draw(claims, 256, scale=300.0)
    errors = []
    for s in (loss, with_numbers(loss, 0.6), with_numbers(loss, 2.0)):
        losses, _ = evaluate(s, tensors(claims, p))
        errors.append(compare(losses, asked(claims.twin)(p, s), p, atol=1e-11, says=f"{shown(s)}: the loss"))
    return "256 pairs", max(errors)


def check_gradient(loss: Any, claims: Claims) -> Figure:
    """d loss / d input in closed form, 0 where that names no such input"""
    p = draw(claims, 64, seed=1)
    errors = []
    for s in (loss, with_numbers(loss, 0.6)):
        _, gradients = evaluate(s, tensors(claims, p))
        if claims.gradient:
            expected = claims.gradient(p, s)
            for name, gradient in of_trained(s, gradients).items():
                says = f"{shown(s)}: d loss / d {name}"
                errors.append(compare(gradient, expected.get(name, np.zeros(64)), p, says=says))
        if hasattr(s, "gradient_weights"):
            weights = s.gradient_weights(tensors(claims, p))
            for name, weight in zip(LOGPS[: s.responses], weights, strict=True):
                says = f"{shown(s)}: minus the gradient weight of {name}"
                errors.append(compare(-weight, gradients[name], p, says=says))
    if not errors:
        raise NotAsked
    return "64 pairs", max(errors)


def check_gradcheck(loss: Any, claims: Claims) -> Figure:
    """first and second derivatives are those of finite differences"""
    p = draw(claims, 6, seed=2)
    pairs = tensors(claims, p)
    names = of_trained(loss, evaluate(loss, pairs)[1])

    def of_inputs(*inputs: Tensor) -> Tensor:
        return loss(pairs._replace(**dict(zip(names, inputs, strict=True))))

    inputs = [getattr(pairs, name) for name in names]
    checks: tuple[Callable[..., bool], ...] = (gradcheck, gradgradcheck)
    for order, check in enumerate(checks, start=1):
        if not check(of_inputs, inputs, raise_exception=False):
            raise Refuted(f"{shown(loss)}: derivatives of order {order} differ from finite differences")
    return f"{len(inputs)} inputs", 0.0


def check_alone(loss: Any, claims: Claims) -> Figure:
    """the loss of a pair is the same alone and in a batch"""
    if not claims.independent:
        raise NotAsked
    p = draw(claims, 5, seed=3)
    losses, _ = evaluate(loss, pairs := tensors(claims, p))
    errors = []
    if isinstance(loss, Stranger) and (returned := loss.returned(pairs)).ndim == 0:
        says = f"{shown(loss)}: of 5 pairs it returns one number, which"
        compare(returned[None], losses.mean()[None], p, 1e-14, 0, f"{says} should be their mean. It")
    for i in range(5):
        one = Pairs(**{name: values[[i]] for name, values in vars(p).items()})
        alone = evaluate(loss, tensors(claims, one))[0]
        says = f"{shown(loss)}: in a batch of 5 the loss"
        errors.append(compare(losses[[i]], alone, one, 1e-14, 0, says))
    return "5 pairs", max(errors)


def check_far(loss: Any, claims: Claims) -> Figure:
    """float32 log-probs from 0, where p = 1, to -100,000: finite, and the twin's"""
    p = draw(claims, 1024, scale=1e5)
    p = Pairs(**{name: np.round(x, -4) if x.dtype == float else x for name, x in vars(p).items()})
    losses, gradients = evaluate(loss, tensors(claims, p, torch.float32))
    require_finite(losses, p, f"{shown(loss)}: the loss")
    for name, gradient in gradients.items():
        require_finite(gradient, p, f"{shown(loss)}: d loss / d {name}")
    expected = claims.twin(p, loss) if claims.twin else losses
    return "1024 pairs", compare(losses, expected, p, 1e-5, 1e-4, f"{shown(loss)}: the loss")


def check_bf16(loss: Any, claims: Claims) -> Figure:
    """bf16 log-probs: no further from float64 than rounding explains"""
    p = draw(claims, 256, seed=5)
    rounded = {n: torch.tensor(x).bfloat16() for n, x in vars(p).items() if x.dtype == float}
    p = Pairs(**vars(p) | {name: x.double().numpy() for name, x in rounded.items()})
    losses, gradients = evaluate(loss, tensors(claims, p))
    found, _ = evaluate(loss, tensors(claims, p, torch.bfloat16))
    # One rounding of every input and of the loss, and as much again for each of three intermediate results.
    # By the closed form, because what a loss takes as a constant is rounded too.
    slopes = claims.gradient(p, loss) if claims.gradient else {n: g.numpy() for n, g in gradients.items()}
    terms = sum(abs(slope * getattr(p, name)) for name, slope in slopes.items())
    allowed = 4 * BF16_ROUNDING * (terms + losses.detach().abs().numpy()) + 1e-6
    return "256 pairs", compare(found, losses, p, 0, allowed, f"{shown(loss)}: the loss of bf16 inputs")


def check_metrics(loss: Any, claims: Claims) -> Figure:
    """what is logged of each pair; a tie is no win"""
    if claims.metrics is None or not hasattr(loss, "metrics"):
        raise NotAsked
    p = draw(claims, 16, seed=6)
    for name, values in vars(p).items():
        if "rejected" in name:  # pair 0 is a tie, pair 1 is told apart without a doubt
            values[0] = getattr(p, name.replace("rejected", "chosen"))[0]
            values[1] = {"rejected": -1000.0, "rejected_length": 1}.get(name, values[1])
    errors: list[float] = []
    for s in (loss, with_numbers(loss, 0.6)):
        losses, _ = evaluate(s, tensors(claims, p))
        found = s.metrics(tensors(claims, p), losses)
        expected = {"loss": losses} | claims.metrics(p, s)
        if getattr(s, "saturates", False):
            expected["saturated"] = losses < SATURATED
        if set(found) != set(expected):
            raise Refuted(f"{shown(s)}: of the logged names, {set(found) ^ set(expected)} are not in both")
        errors += [compare(found[n], expected[n], p, says=f"{shown(s)}: {n}") for n in expected]
    return f"{len(expected)} metrics", max(errors)


def check_mirror(loss: Any, claims: Claims) -> Figure:
    """what swapping the two responses adds to the loss"""
    p = draw(claims, 64, seed=7)
    change = evaluate(loss, tensors(claims, swapped(p)))[0] - evaluate(loss, tensors(claims, p))[0]
    expected = asked(claims.mirror)(p, loss)
    says = f"{shown(loss)}: the loss of the swapped pair minus its loss"
    return "64 pairs", compare(change, expected, p, 1e-10, 1e-10, says)


def check_unmoved(loss: Any, claims: Claims) -> Figure:
    """changes of the inputs that change no loss"""
    errors = []
    for says, (settings, change) in claims.unmoved.items():
        s = with_settings(loss, settings)
        if s is not None:
            p = draw(claims, 64, seed=4)
            losses, _ = evaluate(s, tensors(claims, p))
            moved, _ = evaluate(s, tensors(claims, Pairs(**vars(p) | change(p))))
            errors.append(compare(moved, losses, p, 1e-10, 1e-10, f"{shown(s)}: with {says}, the loss"))
    if not errors:
        raise NotAsked
    return f"{len(errors)} changes", max(errors)


def check_direction(loss: Any, claims: Claims) -> Figure:
    """learning raises chosen and lowers rejected, whatever the pair"""
    s = None if claims.direction is None else with_settings(loss, claims.direction)
    if s is None:
        raise NotAsked
    p = draw(claims, 200)
    _, gradients = evaluate(s, tensors(claims, p))
    for name, sign in (("chosen", -1), ("rejected", 1)):
        signs = gradients[name].sign()
        compare(signs, np.full(200, sign), p, says=f"{shown(s)}: the sign of d loss / d {name}")
    return "200 pairs", 0.0


def check_exact(loss: Any, claims: Claims) -> Figure:
    """training in the exact world ends at the policy derived on paper"""
    if isinstance(claims.optimum, str):
        raise NotAsked(claims.optimum)
    settings, policy = claims.optimum
    s = with_settings(loss, settings)
    if s is None:
        wanted = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise NotAsked(f"the optimum is that of {wanted}, and this loss cannot be set to it")
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    distance = total_variation(train_to_convergence(world, s).values, policy(world))
    if not distance < 1e-5:
        raise Refuted(f"{shown(s)}: it ends {distance:.3f} of total variation away from the derived optimum")
    return "98 pairs", distance


CHECKS: tuple[Check, ...] = (
    check_points,
    check_twin,
    check_gradient,
    check_gradcheck,
    check_alone,
    check_mirror,
    check_unmoved,
    check_direction,
    check_far,
    check_bf16,
    check_metrics,
    check_exact,
)
# These choose their settings; the others are asked of the loss at hand and at the settings of every point.
OF_THEIR_OWN_SETTINGS = {check_points, check_unmoved, check_direction, check_exact}


def of_trained(loss: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that are asked: all of a loss of ours, but another program's may take its reference and
    its reference point as constants."""
    trained = ("chosen", "rejected", "chosen_logps")
    return {n: g for n, g in gradients.items() if n in trained or not isinstance(loss, Stranger)}


def asked(claim: Callable | None) -> Callable:
    if claim is None:
        raise NotAsked
    return claim
