"""Train the project's own transformer to convergence on a population loss, in the listed world of
exact_world.py.

Nothing is sampled: the loss sums over *all* pairs of responses, weighted by how often they are drawn and so
labelled. To check a loss of your own:

    world = make_world()
    trained = train_to_convergence(world, loss)        # an object of minidpo/losses/ or any function like one
    total_variation(trained.values, what_you_derived)  # of log pi(y|x); below 1e-5, or one of them is wrong

Dimensions: X prompts, Y responses per prompt; a table is (X, Y). W weights of the model.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from minidpo.losses import PairLogps, bradley_terry
from minidpo.model import RewardModel, response_logps
from minidpo.packing import PackedBatch, pack
from minidpo.verify.exact_world import World

MOST_STEPS = 300

Loss = Callable[[PairLogps], Tensor]  # B pairs to B losses, like the objects in minidpo/losses/
Objective = Callable[[Tensor], Tensor]  # a table of log-probs or rewards to the number that is minimised
Curvature = Callable[[Tensor], Tensor]  # the same table to a matrix (X Y, X Y) without negative eigenvalues


class Trained(NamedTuple):
    values: Tensor  # (X, Y) log-probs, or rewards
    objective: float
    steps: int


def train_to_convergence(world: World, loss: Loss) -> Trained:
    """Minimise the population loss, starting at the reference. `values` are log-probs."""
    return _train_policy(world, partial(population_loss, world, loss))


def train_rlhf(world: World, beta: float) -> Trained:
    """Maximise E_pi r* - beta KL(pi, pi_ref), starting at the reference. `values` are log-probs.

    The curvature is the Fisher matrix, beta diag(pi) / X: this is the natural policy gradient, which on a
    table without weights in between would be at pi* after one step. The Hessian itself has negative
    eigenvalues far from pi*.
    """

    def fisher(logps: Tensor) -> Tensor:
        return torch.diag(beta * logps.exp().flatten() / len(logps))

    return _train_policy(world, partial(rlhf_loss, world, beta), fisher)


def train_reward_model(world: World) -> Trained:
    """Minimise the Bradley-Terry loss. `values` are rewards, those of each prompt up to a constant."""
    model = RewardModel.from_language_model(copy.deepcopy(world.reference))

    def objective(rewards: Tensor) -> Tensor:
        return (label_weights(world) * bradley_terry(*winners_and_losers(rewards))).sum()

    return gauss_newton(world, model, lambda batch: model.forward_packed(batch)[0], objective)


def _train_policy(world: World, objective: Objective, curvature: Curvature | None = None) -> Trained:
    model = copy.deepcopy(world.reference)
    return gauss_newton(world, model, partial(response_logps, model), objective, curvature)


# --- what is minimised --------------------------------------------------------------------------------------


def population_loss(world: World, loss: Loss, logps: Tensor) -> Tensor:
    """E over pairs from mu x mu and labels from p* of loss(winner, loser): a sum over all ordered pairs.

    The probabilities sum to one already, so log_softmax changes no value. It tells the derivatives that they
    keep doing so, without which a loss that is linear in log-probs would have no curvature.
    """
    policy, reference, lengths = map(
        winners_and_losers, (logps.log_softmax(-1), world.reference_logps, world.lengths)
    )
    return (label_weights(world) * loss(PairLogps(*policy, *reference, *lengths))).sum()


def rlhf_loss(world: World, beta: float, logps: Tensor) -> Tensor:
    """-( E_pi r* - beta KL(pi, pi_ref) ), mean over prompts. Its gradient is the exact policy gradient:

        -E_pi [ (A(y) - E_pi A) grad log pi(y|x) ],    A(y) = r*(x, y) - beta log( pi(y|x) / pi_ref(y|x) )

    This is REINFORCE with the mean for a baseline, which log_softmax brings in; the expectation is summed and
    not sampled. Source of the objective: Rafailov et al. 2023, Eq. 3.
    """
    logps = logps.log_softmax(-1)
    advantages = world.rewards - beta * (logps - world.reference_logps)
    return -(logps.exp() * advantages).sum(-1).mean()


def winners_and_losers(table: Tensor) -> tuple[Tensor, Tensor]:
    """(X, Y) -> two of (X * Y * Y,): all ordered pairs of responses to the same prompt."""
    shape = (*table.shape, table.shape[-1])
    return table[:, :, None].expand(shape).flatten(), table[:, None, :].expand(shape).flatten()


def label_weights(world: World) -> Tensor:
    """2 mu(y) mu(y') p*(y beats y') / X: how often y wins over y', drawn first or second. They sum to one."""
    return (2 * world.meetings * world.preferences).flatten()


# --- how ----------------------------------------------------------------------------------------------------


def gauss_newton(
    world: World,
    model: nn.Module,
    read: Callable[[PackedBatch], Tensor],
    objective: Objective,
    curvature: Curvature | None = None,
) -> Trained:
    """Minimise objective(z) over the weights w, where z is the table that `read` gives: packed batch -> (P,
    K).

        (J^T H J + lambda I) step = -J^T g        J = dz/dw, g and H the objective's derivatives in z
        step = -J^T u,  (H K + lambda I) u = g    K = J J^T: the same step from X Y equations, not thousands

    Source: Levenberg 1944, Marquardt 1963. Adam needs tens of thousands of steps for the fifth digit. With
    more weights than responses this is Newton's method on the table itself, and near the end every step
    doubles the digits. J is the project's own backward, one response at a time: were it wrong, steps would
    not lower the loss. lambda falls when a step lowers it, and rises until one does. curvature: H, if not the
    objective's Hessian. Raises RuntimeError when no step lowers the objective, or MOST_STEPS were not enough.
    """
    parameters = list(model.parameters())
    together, alone = pack(world.texts), [pack(world.alone, np.array([i])) for i in range(len(world.alone))]
    weights = parameters_to_vector(parameters).detach()
    with torch.no_grad():
        values = read(together)
    identity, damping = torch.eye(values.numel(), dtype=values.dtype), 1e-2

    for taken in range(1, MOST_STEPS + 1):
        values.requires_grad_()
        loss = objective(values)
        g = torch.autograd.grad(loss, values)[0].flatten()
        jacobian = torch.stack([weight_gradient(read(batch), parameters) for batch in alone])  # (X Y, W)
        k = jacobian @ jacobian.T
        hk = (curvature or partial(hessian, objective))(values.detach()) @ k
        scale = (hk.trace() + 1e-9 * k.trace()) / len(g)  # not 0 for a loss made of straight lines

        while True:
            u = torch.linalg.solve(hk + damping * scale * identity, g)
            promised = (g @ k @ u).item()  # twice the gain that the quadratic model expects
            with torch.no_grad():
                vector_to_parameters(weights - jacobian.T @ u, parameters)
                values = read(together)
                # At the optimum the rounding of the sum may make a step look worse by this much.
                lowered = objective(values) <= loss + 1e-15 * (1 + loss.abs())
            if lowered and promised > -1e-16:
                break
            damping *= 3
            if damping > 1e12:
                stuck = f"step {taken}: no step lowers the objective from {loss.item()}"
                raise RuntimeError(f"{stuck}; has the loss a kink? It needs second derivatives")
        weights, damping = parameters_to_vector(parameters).detach(), max(damping / 10, 1e-12)
        if promised < 1e-16:
            return Trained(values, objective(values).item(), taken)
    raise RuntimeError(f"not converged in {MOST_STEPS} steps: the last promised to gain {promised / 2:.1e}")


def weight_gradient(output: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """d output / d weights: (1, 1) -> (W,). Weights without influence get zeros."""
    return parameters_to_vector(torch.autograd.grad(output.sum(), parameters, materialize_grads=True))


def hessian(objective: Objective, values: Tensor) -> Tensor:
    """Second derivatives in every entry of the table: (X Y, X Y)."""
    second = torch.autograd.functional.hessian(objective, values, vectorize=True)
    return second.reshape(values.numel(), values.numel())
