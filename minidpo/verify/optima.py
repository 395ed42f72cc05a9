"""The optima of the exact world that have no closed form, found by Newton's method and certified.

Nothing here is shared with minidpo/losses/: each loss is written once more, as it was derived.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.verify.exact_world import World

MOST_STEPS = 200
GRADIENT = 1e-10  # the largest entry of the gradient at what is called a minimum


def best_scores(world: World, label_smoothing: float = 0.0, gamma: float = 0.0) -> tuple[Tensor, float]:
    """The best scores (X, Y) for a logistic loss with smoothing or a margin, and its minimum.

        phi(z) = -q log sigma(z - gamma) - (1-q) log sigma(-z - gamma)
        q = (1-e) p + e (1-p),  z = s(y) - s(y')

    Smoothing e: a label is taken to be swapped with probability e, so p becomes q, and a lone pair goes to
    z = logit q: at most log((1-e)/e), however clear the preference.

    Margin gamma: phi' = 0 reads p/(1-p) = sigma(z + gamma) / sigma(gamma - z). With u = exp(z),
    k = exp(-gamma) and R = exp(r*(y) - r*(y')) that is k u^2 + (1 - R) u - R k = 0, whose positive root at
    gamma = 0 gives z = r* - r*'. Differences near 0 grow (1 + exp(gamma)) / 2 times (implicit derivative at u
    = R = 1), great ones by gamma.

    Neither z is a difference of scores across three or more responses, so no closed form survives there. phi
    is convex in z, hence the sum over pairs in s, and Newton's method finds the scores.
    """
    q = (1 - label_smoothing) * world.preferences + label_smoothing * (1 - world.preferences)

    def expected_loss(scores: Tensor) -> Tensor:
        z = scores[:, :, None] - scores[:, None, :]
        return (world.meetings * (-q * F.logsigmoid(z - gamma) - (1 - q) * F.logsigmoid(-z - gamma))).sum()

    return newton(expected_loss, world.rewards)


def best_policy(world: World, losses: Callable[[Tensor], Tensor]) -> tuple[Tensor, float]:
    """log pi (X, Y) with the least expected loss, and that loss. losses: log pi -> (X, Y, Y), the winner's
    axis first. The policy is the softmax of what Newton's method moves, so its probabilities always sum to
    one.
    """
    frequencies = 2 * world.meetings * world.preferences  # how often the first wins over the second
    scores, least = newton(
        lambda scores: (frequencies * losses(scores.log_softmax(-1))).sum(), world.reference_logps
    )
    return scores.log_softmax(-1), least


def best_with_sft(world: World, beta: float, sft_weight: float) -> tuple[Tensor, float]:
    """DPO with an SFT term: the mean of -log sigma(beta (g(w) - g(l))) - sft_weight log pi(w) / |w|.

    With log pi = s - log sum exp s, the normaliser cancels in g(w) - g(l): the first term is convex in s, and
    so is -log pi(w). Hence one minimum. With sft_weight = 0 it is pi* of (1), and otherwise no closed form:
    setting the derivative in s to zero ties every response to all others by a sum of logistic functions.
    """

    def losses(logps: Tensor) -> Tensor:
        g, per_token = logps - world.reference_logps, logps / world.lengths
        return -F.logsigmoid(beta * (g[:, :, None] - g[:, None, :])) - sft_weight * per_token[:, :, None]

    return best_policy(world, losses)


def best_of_odds(world: World, lambda_or: float) -> tuple[Tensor, float]:
    """ORPO: the mean of -m(w) - lambda_or log sigma(o(w) - o(l)), m = log pi / |y|, o = m - log(1 - exp m).

    o is convex in m, so -o(w) is not, and the loss need not be convex: the minimum is certified among the
    policies nearby alone. It lies inside, because -m(w) grows without end as any probability falls to 0.
    """

    def losses(logps: Tensor) -> Tensor:
        m = logps / world.lengths
        odds = m - torch.log(-torch.expm1(m))
        return -m[:, :, None] - lambda_or * F.logsigmoid(odds[:, :, None] - odds[:, None, :])

    return best_policy(world, losses)


# --- how ----------------------------------------------------------------------------------------------------


def newton(objective: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, float]:
    """The table, from `start` downhill, at which the gradient of a smooth `objective` is 0, and its value
    there.

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
        if (
            gradient @ step
        ).item() < 1e-20:  # the gain that is left; the error before this step is squared by it
            gradient = torch.func.grad(of)(table)
            if gradient.abs().max() > GRADIENT or (eigenvalues[curved] < 0).any():
                raise RuntimeError(
                    f"no minimum: gradient {gradient.abs().max():.1e}, {eigenvalues.min():.1e}"
                )
            return table.view(shape), of(table).item()
    raise RuntimeError(f"no minimum found in {MOST_STEPS} steps")
