"""The optima of the exact world: the closed form, and Newton's method with a certificate where there is none.

claims/ says which loss has which. With the glossary of exact_world.py, and one number c per prompt, fixed by
the probabilities summing to one, most have the form

    log pi(y|x) = base(y) + n(y) (s(y) / beta + c)                                                  (1)

with log pi_ref or 0 for the base, 1 or |y| for n, and one score s per response: r* for the logistic losses.
The expected loss of a pair, -p log sigma(z) - (1-p) log sigma(-z), is least at z = logit p = r*(y) - r*(y'),
and all pairs can be at their least at once. What is left is the entropy of the labels.

Nothing here is shared with minidpo/losses/.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidpo.verify.exact_world import World

MOST_STEPS = 200
GRADIENT = 1e-10  # the largest entry of the gradient at what is called a minimum


def optimal_policy(base: Tensor, scores: Tensor, beta: float, lengths: Tensor | None = None) -> Tensor:
    """Equation (1): log pi (X, Y) = base + n (scores / beta + c), n being 1 or `lengths`.

    f(c) = log sum_y exp(base + n (s / beta + c)) must be 0. f rises, is convex, and its slope, the mean of n
    under the policy, is at least 1: there is one root, and Newton's method finds it from anywhere. For n = 1
    the first step is exact, c = -log Z.
    """
    n = torch.ones_like(base) if lengths is None else lengths.to(base.dtype)
    logps = base + n * scores / beta
    while (excess := logps.logsumexp(-1, keepdim=True)).abs().max() > 1e-13:
        logps = logps - n * excess / (logps.softmax(-1) * n).sum(-1, keepdim=True)
    return logps


def beats_sampler(world: World) -> Tensor:
    """p*(y beats mu) = sum over y' of mu(y') p*(y beats y'): (X, Y), the score that IPO learns."""
    return (world.preferences * world.sampler[:, None, :]).sum(-1)


def best_policy(world: World, losses: Callable[[Tensor], Tensor]) -> Tensor:
    """log pi (X, Y) with the least expected loss. losses: log pi -> (X, Y, Y), the winner's axis first. The
    policy is the softmax of what Newton's method moves, so its probabilities always sum to one."""
    frequencies = 2 * world.meetings * world.preferences  # how often the first wins over the second

    def expected_loss(scores: Tensor) -> Tensor:
        return (frequencies * losses(scores.log_softmax(-1))).sum()

    return newton(expected_loss, world.reference_logps).log_softmax(-1)


def newton(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The table, from `start` downhill, at which the gradient of a smooth `objective` is 0.

    The certificate of a minimum: no entry of the gradient exceeds 1e-10, and the Hessian has no negative
    eigenvalue. Where the objective is convex it is then the least value of all, and elsewhere of all tables
    nearby. Directions without curvature, such as a constant added to all scores of a prompt, are left alone;
    along those with a negative one the step goes downhill too. Raises RuntimeError without a certificate.
    """
    table, shape = start.flatten().clone(), start.shape

    def of(flat: Tensor) -> Tensor:
        return objective(flat.view(shape))

    for _ in range(MOST_STEPS):
        gradient = torch.func.grad(of)(table)
        eigenvalues, vectors = torch.linalg.eigh(torch.func.hessian(of)(table))
        curved = eigenvalues.abs() > 1e-11 * eigenvalues.abs().max()
        along = vectors.T @ gradient
        step = vectors @ torch.where(curved, along / eigenvalues.abs(), 0.0)
        value, size = of(table), 1.0
        # At the minimum, rounding may make the value of a good step look worse by this much.
        while of(table - size * step) > value + 1e-15 * (1 + value.abs()):
            size /= 2
        table = table - size * step
        # The gain that is left; the error before this step is squared by it.
        if (gradient @ step).item() < 1e-20:
            largest = torch.func.grad(of)(table).abs().max()
            if largest > GRADIENT or (eigenvalues[curved] < 0).any():
                raise RuntimeError(f"no minimum: gradient {largest:.1e}, {eigenvalues.min():.1e}")
            return table.view(shape)
    raise RuntimeError(f"no minimum found in {MOST_STEPS} steps")
