"""The checks: each puts one kind of claim about a loss to the test, functions of (loss, claims).

A check returns what it looked at and the greatest error, raises `Refuted` with the first counterexample, or
`NotAsked` where the loss cannot be set to what is claimed. Its docstring is the claim.
"""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from minidpo.verify.draws import NotAsked, Refuted, ask, compare, draw, evaluate, tensors, tied, with_settings
from minidpo.verify.exact_train import train_to_convergence
from minidpo.verify.exact_world import make_world, total_variation
from minidpo.verify.stranger import Stranger

Figure = tuple[str, float]  # what was looked at, and the greatest error
Check = Callable[[Any, Any], Figure]


def check_points(loss: Any, claims: Any) -> Figure:
    """every loss computed by hand"""
    errors = []
    for settings, pair, value in claims.points:
        configured = with_settings(loss, settings)
        # A function may read what not every point has, as DPO's margin.
        read = set(loss.arguments.values()) if isinstance(loss, Stranger) else set()
        if configured is not None and not read & set(claims.fields._fields) - set(pair):
            p = Pairs(**{n: np.array([x], bool if isinstance(x, bool) else float) for n, x in pair.items()})
            losses, _ = evaluate(configured, tensors(claims, p))
            errors.append(compare(configured, "the loss", losses, [value], p, 0, 1e-9))
    if not errors:
        raise NotAsked
    return f"{len(errors)} points", max(errors)


def check_twin(loss: Any, claims: Any) -> Figure:
    """the same equation in NumPy"""
    p = draw(claims, 256, scale=300.0)
    losses, _ = evaluate(loss, tensors(claims, p))
    return "256 pairs", compare(loss, "the loss", losses, ask("twin", claims.twin, p, loss), p, atol=1e-11)


def check_gradient(loss: Any, claims: Any) -> Figure:
    """d loss / d input in closed form, 0 where that names no such input"""
    p = draw(claims, 64, seed=1)
    _, gradients = evaluate(loss, tensors(claims, p))
    expected = dict.fromkeys(gradients, np.zeros(64)) | ask("gradient", claims.gradient, p, loss)
    return "64 pairs", compare_gradients(loss, gradients, expected, p)


def check_gradcheck(loss: Any, claims: Any) -> Figure:
    """first and second derivatives are those of finite differences"""
    pairs = tensors(claims, draw(claims, 6, seed=2))
    names = trained(loss, evaluate(loss, pairs)[1])

    def of_inputs(*inputs: Tensor) -> Tensor:
        return loss(pairs._replace(**dict(zip(names, inputs, strict=True))))

    inputs = [getattr(pairs, name) for name in names]
    checks: tuple[Callable[..., bool], ...] = (gradcheck, gradgradcheck)
    for order, check in enumerate(checks, start=1):
        if not check(of_inputs, inputs, raise_exception=False):
            if order == 1 and claims.gradient:
                check_gradient(loss, claims)
                raise NotAsked("the gradient is as claimed: that of a loss with a constant (stop-gradient)")
            raise Refuted(loss, f"derivatives of order {order} differ from finite differences")
    return f"{len(inputs)} inputs", 0.0


def check_tie(loss: Any, claims: Any) -> Figure:
    """equal responses, or a policy that is its reference: the gradient is that of pairs nearby"""
    p = tied(draw(claims, 64, seed=6), slice(0, 32), slice(32, 64))
    close = [evaluate(loss, tensors(claims, near))[1] for near in nearby(p, 1e-7)]
    gradients, expected = evaluate(loss, tensors(claims, p))[1], {}
    for name, gradient in gradients.items():
        around = torch.stack([near[name] for near in close])
        # A loss with a kink there may take the slope of either side, or one between.
        expected[name] = gradient.clamp(around.amin(0), around.amax(0))
    return "64 pairs", compare_gradients(loss, gradients, expected, p, 1e-4, 1e-4)


def check_alone(loss: Any, claims: Any) -> Figure:
    """loss and gradient of a pair are the same alone and in a batch"""
    if not claims.independent:
        raise NotAsked
    p = draw(claims, 5, seed=3)
    losses, gradients = evaluate(loss, pairs := tensors(claims, p))
    if isinstance(loss, Stranger) and (returned := loss.returned(pairs)).ndim == 0:
        what = "of 5 pairs it returns one number, which should be their mean. It"
        compare(loss, what, returned[None], losses.mean()[None], p, 1e-14, 0)
        inputs = [getattr(pairs, name) for name in gradients]
        of_mean = torch.autograd.grad(returned, inputs, materialize_grads=True)
        gradients = {n: 5 * gradient for n, gradient in zip(gradients, of_mean, strict=True)}
    errors = []
    for i in range(5):
        one = Pairs(**{name: values[[i]] for name, values in vars(p).items()})
        alone, of_alone = evaluate(loss, tensors(claims, one))
        errors.append(compare(loss, "in a batch of 5 the loss", losses[[i]], alone, one, 1e-14, 0))
        of_batch = {name: gradient[[i]] for name, gradient in gradients.items()}
        compare_gradients(loss, of_batch, of_alone, one, what="in a batch of 5 d loss / d")
    return "5 pairs", max(errors)


def check_reads(loss: Any, claims: Any) -> Figure:
    """it reads no more than its flags say; training gives it nothing else"""
    if not hasattr(loss, "needs_reference"):
        raise NotAsked
    flags = dict(ref_=loss.needs_reference, rejected=loss.responses == 2, margin=loss.margin_from_data)
    flags |= dict(label=loss.unpaired, z0=loss.needs_z0)
    pairs = tensors(claims, p := draw(claims, 5, seed=8))
    unread = [n for n in pairs._fields if any(word in n and not flag for word, flag in flags.items())]
    without = f"without {', '.join(unread)}"
    try:
        losses = loss(pairs._replace(**dict.fromkeys(unread)))
    except Exception as error:
        raise Refuted(loss, f"{without} it raises {type(error).__name__}: {error}") from None
    return f"{len(unread)} left out", compare(loss, f"{without} the loss", losses, loss(pairs), p)


def check_mirror(loss: Any, claims: Any) -> Figure:
    """what swapping the two responses adds to the loss"""
    p = draw(claims, 64, seed=7)
    swapped = Pairs(**vars(p))
    for name, x in vars(p).items():
        other = name.replace("chosen", "rejected")
        if other != name and other in vars(p):
            vars(swapped).update({name: vars(p)[other], other: x})
    change = evaluate(loss, tensors(claims, swapped))[0] - evaluate(loss, tensors(claims, p))[0]
    what, expected = "the loss of the swapped pair minus its loss", ask("mirror", claims.mirror, p, loss)
    return "64 pairs", compare(loss, what, change, expected, p, 1e-10, 1e-10)


def check_unmoved(loss: Any, claims: Any) -> Figure:
    """changes of the inputs that change no loss"""
    s = with_settings(loss, claims.points[0][0]) if claims.points else loss
    if s is None:
        raise NotAsked
    p, errors = draw(claims, 64, seed=4), []
    losses, _ = evaluate(s, tensors(claims, p))
    for says, change in claims.unmoved.items():
        changed = ask(f"unmoved, {says}", change, p)
        moved, _ = evaluate(s, tensors(claims, Pairs(**vars(p) | changed)))
        errors.append(compare(s, f"with {says}, the loss", moved, losses, p, 1e-10, 1e-10))
    return f"{len(errors)} changes", max(errors)


def check_far(loss: Any, claims: Any) -> Figure:
    """float32 log-probs from 0, where p = 1, to -100,000, rewards to +-12,500, long texts: finite, right"""
    p = draw(claims, 1024, scale=1e5)
    for i, (name, x) in enumerate(vars(p).items()):
        if name.endswith("_length"):
            x[::2] *= 333  # every second response has up to 99,900 tokens
        elif x.dtype == float:
            # Sums of such numbers are exact in float32, and none are equal: a loss may have a kink there.
            x[:] = np.copysign(abs(np.round(x, -4)) + 10 * (i + 1) ** 2, x)
            x[i::16] = 0.0
    losses, gradients = evaluate(loss, tensors(claims, p, torch.float32))
    for what, values in {"the loss": losses, **{f"d loss / d {n}": g for n, g in gradients.items()}}.items():
        if len(places := (~values.isfinite()).nonzero()):
            raise Refuted(loss, f"{what} is {values[i := int(places[0])].item()}", p, i)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = ask("gradient", claims.gradient, p, loss) if claims.gradient else {}
    # A closed form may have no value where p = 1.
    known = {n: np.where(np.isfinite(x), x, gradients[n]) for n, x in slopes.items() if n in gradients}
    compare_gradients(loss, gradients, {**gradients, **known}, p, 1e-5, 1e-4)
    twin = ask("twin", claims.twin, p, loss) if claims.twin else losses
    return "1024 pairs", compare(loss, "the loss", losses, twin, p, 1e-5, 1e-4)


def check_bf16(loss: Any, claims: Any) -> Figure:
    """bf16 log-probs: no further from float64 than rounding explains"""
    p = draw(claims, 256, seed=5)
    rounded = {n: torch.tensor(x).bfloat16() for n, x in vars(p).items() if x.dtype == float}
    p = Pairs(**vars(p) | {name: x.double().numpy() for name, x in rounded.items()})
    losses, _ = evaluate(loss, tensors(claims, p))
    pairs = tensors(claims, p, torch.bfloat16)
    # PairLogps and Rewards raise them to float32; another program's loss is given bf16.
    found, _ = evaluate(loss, pairs if isinstance(loss, Stranger) else claims.fields(*pairs))
    # One rounding, 2^-8, of every input and of the loss, and as much again for each of three intermediate
    # results. By the closed form, because what a loss takes as a constant is rounded too, and by the greatest
    # slope nearby, because rounding may carry a pair across a kink.
    terms: Any = 0.0
    for near in nearby(p, 2.0**-7):
        if claims.gradient:
            slopes = ask("gradient", claims.gradient, near, loss)
        else:
            slopes = {n: g.numpy() for n, g in evaluate(loss, tensors(claims, near))[1].items()}
        terms = np.maximum(terms, sum(abs(slope * getattr(p, name)) for name, slope in slopes.items()))
    allowed = 4 * 2.0**-8 * (terms + losses.detach().abs().numpy()) + 1e-6
    return "256 pairs", compare(loss, "the loss of bf16 inputs", found, losses, p, 0, allowed)


def check_exact(loss: Any, claims: Any) -> Figure:
    """training in the exact world ends at the policy derived on paper"""
    if not callable(claims.optimum):
        raise NotAsked(claims.optimum or "no optimum is claimed")
    world = make_world(seed=0, prompts=2, words=2, max_tokens=2, hidden_size=16)
    distances = []
    for s in filter(None, (with_settings(loss, settings) for settings in claims.optima.values())):
        trained = train_to_convergence(world, s).values
        distances.append(total_variation(trained, ask("optimum", claims.optimum, world, s)))
        if not distances[-1] < 1e-5:
            raise Refuted(s, f"it ends {distances[-1]:.3f} of total variation away from the derived optimum")
    if not distances:
        titles = ", ".join(claims.optima) or "no settings (the claims' optima)"
        raise NotAsked(f"the optima are those of {titles}, and this loss cannot be set to one of them")
    return f"{len(distances)} optim{'um' if len(distances) == 1 else 'a'}", max(distances)


# By name. One whose name is a field of the claims is asked where that is given.
CHECKS: dict[str, Check] = dict(
    points=check_points,
    twin=check_twin,
    gradient=check_gradient,
    gradcheck=check_gradcheck,
    tie=check_tie,
    alone=check_alone,
    reads=check_reads,
    mirror=check_mirror,
    unmoved=check_unmoved,
    far=check_far,
    bf16=check_bf16,
    exact=check_exact,
)
# These choose their settings; the others are asked of the loss at hand and at the settings of every point.
OF_THEIR_OWN_SETTINGS = ("points", "unmoved", "exact")


def trained(loss: Any, names: Iterable[str]) -> list[str]:
    """The inputs whose gradients are asked: all of a loss of ours, but another program's may take its
    reference and its reference point as constants."""
    return [n for n in names if n in ("chosen", "rejected", "chosen_logps") or not isinstance(loss, Stranger)]


def nearby(p: Pairs, share: float) -> Iterator[Pairs]:
    """The pairs 16 times, with their numbers moved at random by up to this share of them."""
    rng = np.random.default_rng(6)
    for _ in range(16):
        moved = {n: x * rng.uniform(1 - share, 1 + share) for n, x in vars(p).items() if x.dtype == float}
        yield Pairs(**vars(p) | moved)


def compare_gradients(
    loss: Any, found: dict, expected: dict, p: Pairs, *tolerances: float, what: str = "d loss / d"
) -> float:
    names = trained(loss, found)
    return max(compare(loss, f"{what} {n}", found[n], expected[n], p, *tolerances) for n in names)
