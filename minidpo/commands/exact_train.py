"""Train the project's own transformer to convergence on a population loss, in exact_world.py's listed world.

Nothing is sampled: the loss sums over *all* pairs of responses, weighted by how often they are drawn and so
labelled.
To check a loss of your own:

    world = make_world()
    def loss(batch: AllPairs) -> Tensor: ...            # one value a pair
    trained = train_to_convergence(world, loss)         # trained.values: log pi(y|x), a row a prompt
    total_variation(trained.values, what_you_derived)   # below 1e-5, or one of the two is wrong

Dimensions: X prompts, Y responses a prompt; a table is (X, Y). W weights of the model.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from minidpo.commands.exact_world import World
from minidpo.logprobs import response_logps
from minidpo.losses import bradley_terry_loss
from minidpo.packing import PackedRow, Wanted, pack_row
from minidpo.reward import RewardModel

MOST_STEPS = 300


class AllPairs(NamedTuple):
    """Every (winner, loser) of every prompt, one after the other: (X * Y * Y,) each."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor
    reference_rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor

    @property
    def logps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first four, in the order in which the losses take them."""
        return self[:4]

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        return self[4:]


class Trained(NamedTuple):
    values: Tensor  # (X, Y) log-probs, or rewards
    objective: float
    steps: int


Loss = Callable[[AllPairs], Tensor]  # one value a pair
Objective = Callable[[Tensor], Tensor]  # a table of log-probs or rewards to the number that is minimised
Curvature = Callable[[Tensor], Tensor]  # the same table to a matrix (X Y, X Y) without negative eigenvalues


def train_to_convergence(world: World, loss: Loss) -> Trained:
    """Minimise the population loss, the policy starting as the reference. `values` are log-probs."""
    return _train_policy(world, partial(population_loss, world, loss))


def train_rlhf(world: World, beta: float) -> Trained:
    """Maximise E_pi r* - beta KL(pi, pi_ref), the policy starting as the reference. `values` are log-probs.

    The curvature is the Fisher matrix, beta diag(pi) / X: this is the natural policy gradient, which on a
    table without weights in between would be at pi* after one step. The Hessian itself has negative
    eigenvalues far from pi*.
    """

    def fisher(logps: Tensor) -> Tensor:
        return torch.diag(beta * logps.exp().flatten() / len(logps))

    return _train_policy(world, partial(rlhf_loss, world, beta), fisher)


def train_reward_model(world: World) -> Trained:
    """Minimise the Bradley-Terry loss. `values` are rewards, each prompt's up to a constant."""

    def objective(rewards: Tensor) -> Tensor:
        return (label_weights(world) * bradley_terry_loss(*winners_and_losers(rewards))).sum()

    model = RewardModel.from_language_model(copy.deepcopy(world.reference))
    return gauss_newton(world, model, Wanted(rewards=True), lambda row: model.pair_rewards(row)[0], objective)


def _train_policy(world: World, objective: Objective, curvature: Curvature | None = None) -> Trained:
    model = copy.deepcopy(world.reference)
    wanted = Wanted(chosen_logps=True, rejected_logps=True)
    return gauss_newton(world, model, wanted, partial(response_logps, model), objective, curvature)


# --- what is minimised --------------------------------------------------------------------------------------


def population_loss(world: World, loss: Loss, logps: Tensor) -> Tensor:
    """E over pairs from mu x mu and labels from p* of loss(winner, loser): a sum over all ordered pairs."""
    batch = AllPairs(
        *winners_and_losers(logps),
        *winners_and_losers(world.reference_logps),
        *winners_and_losers(world.lengths),
    )
    return (label_weights(world) * loss(batch)).sum()


def rlhf_loss(world: World, beta: float, logps: Tensor) -> Tensor:
    """-( E_pi r* - beta KL(pi, pi_ref) ), mean over prompts. Its gradient is the exact policy gradient:

        -E_pi [ (A(y) - E_pi A) grad log pi(y|x) ],    A(y) = r*(x, y) - beta log( pi(y|x) / pi_ref(y|x) )

    REINFORCE with the mean for a baseline, the expectation summed and not sampled. Source of the objective:
    Rafailov et al. 2023 Eq. 3. The probabilities sum to one already, so log_softmax changes no value here; it
    tells the derivatives that they keep doing so, which is where the baseline comes from.
    """
    logps = logps.log_softmax(-1)
    advantages = world.rewards - beta * (logps - world.reference_logps)
    return -(logps.exp() * advantages).sum(-1).mean()


def winners_and_losers(table: Tensor) -> tuple[Tensor, Tensor]:
    """(X, Y) -> two of (X * Y * Y,): all ordered pairs of a prompt's responses."""
    shape = (*table.shape, table.shape[-1])
    return table[:, :, None].expand(shape).flatten(), table[:, None, :].expand(shape).flatten()


def label_weights(world: World) -> Tensor:
    """2 mu(y) mu(y') p*(y beats y') / X: how often y wins over y', drawn first or second. They sum to one."""
    return (2 * world.meetings * world.preferences).flatten()


# --- how ----------------------------------------------------------------------------------------------------


def gauss_newton(
    world: World,
    model: nn.Module,
    wanted: Wanted,
    read: Callable[[PackedRow], Tensor],
    objective: Objective,
    curvature: Curvature | None = None,
) -> Trained:
    """Minimise objective(z) over the weights w; z is the table that `read` gives.

        (J^T H J + lambda I) step = -J^T g        J = dz/dw, g and H the objective's derivatives in z
        step = -J^T u,  (H K + lambda I) u = g    K = J J^T: the same step from X Y equations, not thousands

    Source: Levenberg 1944, Marquardt 1963. Adam needs tens of thousands of steps for the fifth digit. With
    more weights than responses this is Newton's method on the table itself, and near the end every step
    doubles the digits. J is the project's own backward, one response at a time: were it wrong, steps would
    not lower the loss. lambda falls when a step lowers it, and rises until one does.
    curvature: H, where it should not be the objective's Hessian. read: packed row -> (pairs, 2).
    Raises RuntimeError when no step lowers the objective, or MOST_STEPS were not enough.
    """
    parameters = list(model.parameters())
    everything = pack_row(world.pairs, wanted)
    # And a row for each pair: one response's gradient then costs one pair, not all of them.
    rows = [pack_row(world.pairs.select(np.array([i])), wanted) for i in range(len(world.pairs))]
    weights = parameters_to_vector(parameters).detach()
    with torch.no_grad():
        values = world.table(read(everything))
    identity, damping = torch.eye(values.numel(), dtype=values.dtype), 1e-2
    for taken in range(1, MOST_STEPS + 1):
        values.requires_grad_()
        loss = objective(values)
        g = torch.autograd.grad(loss, values)[0].flatten()
        jacobian = torch.stack([output_gradients(read(row), parameters) for row in rows])  # (pairs, 2, W)
        jacobian = world.table(jacobian).flatten(0, 1)  # (X Y, W)
        k = jacobian @ jacobian.T
        hk = (curvature or partial(hessian, objective))(values.detach()) @ k
        scale = (hk.trace() + 1e-9 * k.trace()) / len(g)  # not 0 for a loss made of straight lines
        while damping < 1e12:
            u = torch.linalg.solve(hk + damping * scale * identity, g)
            promised = (g @ k @ u).item()  # twice the gain that the quadratic model expects
            with torch.no_grad():
                vector_to_parameters(weights - jacobian.T @ u, parameters)
                values = world.table(read(everything))
                # At the optimum the rounding of the sum may make a step look worse by this much.
                lowered = objective(values) <= loss + 1e-15 * (1 + loss.abs())
            if lowered and promised > -1e-16:
                break
            damping *= 3
        else:
            raise RuntimeError(
                f"step {taken}: no step lowers the objective from {loss.item()}; has the loss a kink? It needs second derivatives"
            )
        weights, damping = parameters_to_vector(parameters).detach(), max(damping / 10, 1e-12)
        if promised < 1e-16:
            return Trained(values, objective(values).item(), taken)
    raise RuntimeError(f"not converged in {MOST_STEPS} steps: the last promised to gain {promised / 2:.1e}")


def output_gradients(outputs: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """d outputs / d weights of one pair: (1, 2) -> (2, W). Weights without influence get zeros."""
    rows = []
    for output in outputs.flatten():
        gradients = torch.autograd.grad(output, parameters, retain_graph=True, materialize_grads=True)
        rows.append(parameters_to_vector(gradients))
    return torch.stack(rows)


def hessian(objective: Objective, values: Tensor) -> Tensor:
    """Second derivatives in every entry of the table: (X Y, X Y)."""
    second = torch.autograd.functional.hessian(objective, values, vectorize=True)
    return second.reshape(values.numel(), values.numel())
