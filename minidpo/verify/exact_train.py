"""Train the project's own transformer to convergence on a population loss, in the world of exact_world.py.

No pair is drawn: the loss sums over *all* pairs of responses, weighted by how often they would be drawn and
so labelled. `train_to_convergence` takes an object of minidpo/losses/ or any function like one.

Dimensions: X prompts, Y responses per prompt; a table is (X, Y). W weights of the model.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from minidpo.data import PairTokens
from minidpo.losses import PairLogps, bradley_terry
from minidpo.model import RewardModel, response_logps
from minidpo.model.reward_model import fresh_score
from minidpo.packing import PackedBatch, pack
from minidpo.verify.exact_world import World, optimal_policy

MOST_STEPS = 300

Loss = Callable[[PairLogps], Tensor]  # B pairs to B losses, like the objects in minidpo/losses/


class Trained(NamedTuple):
    values: Tensor  # (X, Y) log-probs; of `gauss_newton` what it reads
    objective: float
    steps: int


def train_to_convergence(world: World, loss: Loss) -> Trained:
    """Minimise the population loss, starting at the reference."""
    model = copy.deepcopy(world.reference)
    return gauss_newton(world, model, partial(response_logps, model), partial(population_loss, world, loss))


def train_rlhf(world: World, beta: float) -> Trained:
    """Minimise `rlhf_loss`, starting at the reference.

    The curvature is the Fisher matrix, beta diag(pi) / X: this is the natural policy gradient, which on a
    table without weights in between would be at pi* after one step. The Hessian itself has negative
    eigenvalues far from pi*.
    """
    fisher = lambda logps: torch.diag(beta * logps.exp().flatten() / len(logps))  # noqa: E731
    model = copy.deepcopy(world.reference)
    objective = partial(rlhf_loss, world, beta)
    return gauss_newton(world, model, partial(response_logps, model), objective, fisher)


def train_reward_model(world: World, beta: float) -> Trained:
    """Minimise `reward_loss`. `values` are those of the policy that the closed form makes of the rewards."""
    with torch.device("meta"):
        model = RewardModel(world.reference.config)
    score = {"score.weight": fresh_score(world.reference.config.hidden_size).double()}
    model.load_state_dict(world.reference.state_dict() | score, assign=True)
    read = lambda batch: model.forward_packed(batch)[0]  # noqa: E731
    trained = gauss_newton(world, model, read, partial(reward_loss, world))
    return trained._replace(values=optimal_policy(world.reference_logps, trained.values, beta))


# --- what is minimised --------------------------------------------------------------------------------------


def population_loss(world: World, loss: Loss, logps: Tensor) -> Tensor:
    """E over pairs from mu x mu and labels from p* of loss(winner, loser): a sum over all ordered pairs. A
    loss that takes a share of the labels to be swapped (robust DPO's flip_rate) is given such labels.

    The probabilities sum to one already, so log_softmax changes no value. It tells the derivatives that they
    keep doing so, without which a loss that is linear in log-probs would have no curvature.
    """
    tables = (logps.log_softmax(-1), world.reference_logps, world.lengths)
    pairs = PairLogps(*(column for table in tables for column in winners_and_losers(table)))
    return (world.wins(getattr(loss, "flip_rate", 0.0)).flatten() * loss(pairs)).sum()


def reward_loss(world: World, rewards: Tensor) -> Tensor:
    """The same of the Bradley-Terry loss."""
    return (world.wins().flatten() * bradley_terry(*winners_and_losers(rewards))).sum()


def rlhf_loss(world: World, beta: float, logps: Tensor) -> Tensor:
    """-( E_pi r* - beta KL(pi, pi_ref) ), mean over prompts. Rafailov et al. 2023, Eq. 3.

    Its gradient is the exact policy gradient, -E_pi [ (A(y) - E_pi A) grad log pi(y|x) ] with the advantage
    A(y) = r*(x, y) - beta log( pi(y|x) / pi_ref(y|x) ): REINFORCE with the mean for a baseline, which
    log_softmax brings in. The expectation is a sum over all responses.
    """
    logps = logps.log_softmax(-1)
    advantages = world.rewards - beta * (logps - world.reference_logps)
    return -(logps.exp() * advantages).sum(-1).mean()


def winners_and_losers(table: Tensor) -> tuple[Tensor, Tensor]:
    """(X, Y) -> two of (X * Y * Y,): all ordered pairs of responses to the same prompt."""
    shape = (*table.shape, table.shape[-1])
    return table[:, :, None].expand(shape).flatten(), table[:, None, :].expand(shape).flatten()


# --- how ----------------------------------------------------------------------------------------------------


def gauss_newton(
    world: World,
    model: nn.Module,
    read: Callable[[PackedBatch], Tensor],
    objective: Callable[[Tensor], Tensor],
    curvature: Callable[[Tensor], Tensor] | None = None,
) -> Trained:
    """Minimise objective(z) over the weights w, where z is the table (P, K) that `read` makes of a batch.

        (J^T H J + lambda I) step = -J^T g        J = dz/dw, g and H the objective's derivatives in z
        step = -J^T u,  (H K + lambda I) u = g    K = J J^T: the same step from X Y equations, not thousands

    Source: Levenberg 1944, Marquardt 1963. Adam needs tens of thousands of steps for the fifth digit; here
    every step near the end doubles the digits. J is the project's own backward, one response at a time: were
    it wrong, steps would not lower the loss. lambda falls when a step lowers it, and rises until one does.
    curvature: H, (X Y, X Y) of z, without negative eigenvalues, if not the objective's Hessian. Raises
    RuntimeError when no step lowers the objective, or MOST_STEPS were not enough.
    """
    parameters = list(model.parameters())
    alone = [pack(PairTokens.from_responses([x], [[y]])) for x in world.prompts for y in world.responses]
    weights = parameters_to_vector(parameters).detach()
    with torch.no_grad():
        values = read(world.batch)
    identity, damping = torch.eye(values.numel(), dtype=values.dtype), 1e-2
    curvature = curvature or partial(torch.autograd.functional.hessian, objective, vectorize=True)

    for taken in range(1, MOST_STEPS + 1):
        values.requires_grad_()
        loss = objective(values)
        g = torch.autograd.grad(loss, values)[0].flatten()
        # (X Y, W); a weight without influence has a gradient of 0.
        rows = (torch.autograd.grad(read(b).sum(), parameters, materialize_grads=True) for b in alone)
        jacobian = torch.stack([parameters_to_vector(row) for row in rows])
        k = jacobian @ jacobian.T
        hk = curvature(values.detach()).reshape(k.shape) @ k
        scale = (hk.trace() + 1e-9 * k.trace()) / len(g)  # not 0 for a loss made of straight lines

        while True:
            u = torch.linalg.solve(hk + damping * scale * identity, g)
            promised = (g @ k @ u).item()  # twice the gain that the quadratic model expects
            with torch.no_grad():
                vector_to_parameters(weights - jacobian.T @ u, parameters)
                values = read(world.batch)
                # At the optimum the rounding of the sum may make a step look worse by this much.
                lowered = objective(values) <= loss + 1e-15 * (1 + loss.abs())
            if lowered and promised > -1e-16:
                break
            damping *= 3
            if damping > 1e12:
                stuck = f"step {taken}: no step lowers the objective from {loss.item()}"
                raise RuntimeError(f"{stuck}: a kink, or a gradient that is not the loss's")
        weights, damping = parameters_to_vector(parameters).detach(), max(damping / 10, 1e-12)
        if promised < 1e-16:
            return Trained(values, objective(values).item(), taken)
    raise RuntimeError(f"not converged in {MOST_STEPS} steps: the last promised to gain {promised / 2:.1e}")
