"""The battery: what is asked of every loss, as plain functions.

Describe a loss once as a `Case`; CHECKS then prove or refute it. loss_table.py describes the project's own,
test_own_loss.py shows one from outside, and wrong_losses.py lists mistakes, every one of which is refuted.
A failed claim is an AssertionError.
"""

import itertools

import numpy as np
import torch
from case import Case, close, swapped
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from minidpo.losses import SATURATED


def and_other_settings(case: Case) -> tuple[Case, Case]:
    """The case, and the case with each number at 0.6 of its value: a loss that ignores one is found out."""
    return case, case.with_settings(**{name: 0.6 * value for name, value in case.numbers.items()})


# --- what is asked of a loss --------------------------------------------------------------------------------


def check_points(case: Case) -> None:
    """Hand-computed values, to the ten decimals written beside them; the defaults are part of the claim."""
    for point in case.points:
        at = case.with_settings(**point.settings)
        arrays = {name: np.array([value]) for name, value in point.pair.items()}
        lengths = {"chosen_length": np.array([3]), "rejected_length": np.array([7])}
        pairs = at.pairs(lengths | arrays)  # where a point names no lengths, they must not matter
        close(at.losses(pairs), [point.loss], rtol=0, atol=1e-9, claim="hand-computed loss")
        if point.rewards:
            close(torch.cat(at.loss.rewards(pairs)), point.rewards, rtol=0, atol=1e-9, claim="rewards")


def check_twin(case: Case) -> None:
    """The losses equal those of the NumPy twin."""
    arrays = case.draw(64)
    for each in and_other_settings(case):
        losses = each.losses(each.pairs(arrays))
        if each.twin:
            close(losses, each.written(each.twin, arrays), atol=1e-11, claim="NumPy twin")


def check_gradient(case: Case) -> None:
    """d loss / d input is the closed form, input by input; `gradient_weights` are its negative."""
    arrays = case.draw(64, seed=1)
    for each in and_other_settings(case):
        pairs = each.pairs(arrays)
        gradients = each.gradients(pairs, each.losses(pairs))
        if each.gradient:
            for name, expected in each.written(each.gradient, arrays).items():
                close(gradients[name], expected, claim=f"d loss / d {name}")
        if hasattr(each.loss, "gradient_weights"):
            weights = each.loss.gradient_weights(pairs)
            assert len(weights) == each.loss.responses, "one weight per response that the loss reads"
            for name, weight in zip(("chosen", "rejected"), weights, strict=False):
                close(weight, -gradients[name], claim=f"gradient weight of {name}")


def check_derivatives(case: Case) -> None:
    """First and second derivatives in every input equal finite differences; none is 0 everywhere."""
    pairs = case.pairs(case.draw(6, seed=2))
    for name, gradient in case.gradients(pairs, case.losses(pairs)).items():
        assert gradient.any(), f"d loss / d {name} is 0 for every pair drawn"

    def of_inputs(*inputs: Tensor) -> Tensor:
        return case.loss(pairs._replace(**dict(zip(case.inputs, inputs, strict=True))))

    inputs = tuple(getattr(pairs, name) for name in case.inputs)
    assert gradcheck(of_inputs, inputs, raise_exception=False), "gradcheck"
    assert gradgradcheck(of_inputs, inputs, raise_exception=False), "gradgradcheck"


def check_independence(case: Case) -> None:
    """The loss of a pair is the same alone, in a batch and in any order."""
    arrays = case.draw(5, seed=3)
    losses = case.losses(case.pairs(arrays)).detach()
    for order in ([4], [0], [2, 0, 4, 1, 3]):
        part = {name: values[order] for name, values in arrays.items()}
        close(case.losses(case.pairs(part)), losses[order], rtol=1e-14, atol=0, claim=f"pairs {order} alone")


def check_invariances(case: Case) -> None:
    """What must not matter does not; swapping the pair does exactly what it must."""
    arrays = case.draw(64, seed=4)
    losses = case.losses(case.pairs(arrays))
    for change, c in itertools.product(case.unmoved_by, (0.5, -2.0, 8.0)):
        moved = case.losses(case.pairs(change(arrays, c)))
        close(moved, losses, rtol=1e-10, atol=1e-10, claim="a change that must not matter")
    if case.mirror:
        even = case.with_settings(**{name: 0.0 for name in case.numbers if name in ("gamma", "margin")})
        gap = even.losses(even.pairs(arrays)) - even.losses(even.pairs(swapped(arrays)))
        close(gap, even.written(case.mirror, arrays), rtol=1e-10, atol=1e-10, claim="swapped pair")


def check_extremes(case: Case) -> None:
    """float32 with log-probs from -`nearest` down to -`extreme` is finite, and equals float64 and the twin.

    A log-prob in float32 can be exactly 0, where p = 1: a term like log(1 - p) needs a floor there.
    """
    nearest, far = case.nearest / case.extreme, case.extreme
    places = [case.from_unit(name, np.array([nearest, 0.1, 0.5, 0.9, 1.0]), far) for name in case.inputs]
    columns = np.array(list(itertools.product(*places))).T  # (inputs, B)
    for length in (1, 1000):
        arrays = dict(zip(case.inputs, columns, strict=True))
        arrays |= {name: np.full(columns.shape[1], length) for name in case.lengths}
        pairs = case.pairs(arrays, torch.float32)
        losses = case.losses(pairs)
        for bad in (~losses.isfinite()).nonzero()[:1, 0].tolist():
            at = {name: float(arrays[name][bad]) for name in case.inputs}
            what = f"the loss is {losses[bad].item()} at {at}"
            raise AssertionError(f"{what}; it must be finite from `nearest` (0: p = 1) to -`extreme`")
        for name, gradient in case.gradients(pairs, losses).items():
            assert np.isfinite(gradient).all(), f"d loss / d {name} is not finite"
        precise = case.losses(case.pairs(arrays))
        close(losses, precise, rtol=1e-5, atol=1e-6, claim="float32")
        if case.twin:
            close(precise, case.written(case.twin, arrays), claim="NumPy twin, far out")


def check_bf16(case: Case) -> None:
    """bf16 inputs are computed in float32 on what rounding left of them, and move the loss no more than that.

    Rounding to bf16 moves an input by at most 2^-8 of itself. Between two points a convex function changes by
    no more than its steeper end's slope times the way: |change| <= 2^-8 sum |input| max |d loss / d input|.
    (A loss that is not convex may break this bound and be right.)
    """
    arrays = case.draw(64, seed=5)
    rounded = arrays | {n: torch.tensor(arrays[n]).bfloat16().double().numpy() for n in case.inputs}
    full, exact = case.pairs(arrays, torch.float32), case.pairs(rounded, torch.float32)
    half = case.loss(case.pairs(arrays, torch.bfloat16))
    in_full, in_exact = case.losses(full), case.losses(exact)
    assert half.dtype == torch.float32 and torch.equal(half, in_exact), "bf16 must be computed in float32"
    slopes, slopes_exact = case.gradients(full, in_full), case.gradients(exact, in_exact)
    steepest = {n: np.maximum(abs(slopes[n]), abs(slopes_exact[n])) for n in case.inputs}
    bound = 2.0**-8 * sum(abs(arrays[n]) * steepest[n] for n in case.inputs) + 1e-5
    assert (abs(half - in_full).detach().numpy() <= bound).all(), "bf16 moved the loss too far"


def check_metrics(case: Case) -> None:
    """What is logged of each pair: a tie is no win, and a pair without a gradient left is saturated."""
    arrays = case.draw(16, seed=6)
    for name in (name for name in case.inputs if "rejected" in name):  # pair 0 is a tie
        arrays[name][0] = arrays[name.replace("rejected", "chosen")][0]
        arrays[case.lengths[-1]][0] = arrays["chosen_length"][0]
    if "rejected" in arrays:  # pair 1 could not be told apart better
        arrays["rejected"][1], arrays[case.lengths[-1]][1] = -1000.0, 1
    for each in and_other_settings(case):
        pairs = each.pairs(arrays)
        losses = each.losses(pairs)
        found = each.loss.metrics(pairs, losses)
        expected = {"loss": losses} | (each.written(each.metrics, arrays) if each.metrics else {})
        if getattr(each.loss, "saturates", False):
            expected["saturated"] = losses < SATURATED
        assert not each.metrics or set(found) == set(expected), f"metrics {set(found) ^ set(expected)}"
        for name, values in found.items():
            assert values.shape == losses.shape, f"{name} is not one value per pair"
            if name in expected:
                close(values, expected[name], claim=name)


def check_refusals(case: Case) -> None:
    """A setting out of its range is a ValueError that names it, its value and what it must be."""
    never = {"beta": (0.0, -0.1), "label_smoothing": (-0.1, 0.5, 1.0)}
    for name in case.numbers:
        for value in (*never.get(name, (-1.0,)), float("inf"), float("nan")):
            try:
                case.with_settings(**{name: value})
            except ValueError as error:
                says = f"{name} is {value}; it must be "
                assert says in str(error), f"{str(error)!r} does not say {says!r}"
            else:
                raise AssertionError(f"{name} = {value} is not refused")


CHECKS = (
    check_points,
    check_twin,
    check_gradient,
    check_invariances,
    check_independence,
    check_extremes,
    check_bf16,
    check_metrics,
    check_refusals,
    check_derivatives,
)
