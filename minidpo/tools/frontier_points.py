"""What the frontier measures: a policy's true reward and KL at one step, and the most that any could earn."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidpo.model import Transformer
from minidpo.tools.demo.samples import UnseenPrompts
from minidpo.training.reward_scorer import mean_and_error


class Point(NamedTuple):
    """A policy at one step. Standard errors are over prompts: responses to one prompt are averaged first."""

    step: int
    reward: float  # mean r* of its responses, nats
    reward_error: float
    kl: float  # KL(policy || reference) per response, nats
    kl_error: float
    length: float  # words


def measure(unseen: UnseenPrompts, model: Transformer, step: int, samples: int) -> Point:
    """Sample, judge and compare with the reference: `samples` responses to each unseen prompt."""
    drawn = [unseen.sample(model, seed) for seed in range(samples)]
    kls = np.stack([unseen.kl(model, one) for one in drawn])
    rewards = np.array([[judged.reward for judged in one.judgements] for one in drawn])
    lengths = [judged.length for one in drawn for judged in one.judgements]
    return Point(step, *over_prompts(rewards), *over_prompts(kls), length=float(np.mean(lengths)))


def over_prompts(values: np.ndarray) -> tuple[float, float]:
    """values (samples, prompts) -> mean, and its standard error over prompts."""
    return mean_and_error(values.mean(axis=0, dtype=np.float64))


def best_of_reference(unseen: UnseenPrompts, samples: int) -> dict[str, list[float]]:
    """`best_reachable` from `samples` responses of the reference to each prompt."""
    # These seeds differ from those of the reference's own point.
    drawn = [unseen.sample(unseen.reference, seed) for seed in range(1000, 1000 + samples)]
    rewards = [[judged.reward for judged in one.judgements] for one in drawn]
    return best_reachable(torch.tensor(rewards, dtype=torch.float64).T)


def best_reachable(rewards: Tensor) -> dict[str, list[float]]:
    """The most reward that a KL buys, by reweighting the reference's own responses.

        pi*(y|x) = pi_ref(y|x) exp(r*(x, y) / tau) / Z(x)        has the most reward of all with its KL

    rewards: (prompts, S), nats. Each of S responses to a prompt gets the weight w = softmax(r* / tau); then
    reward = sum w r* and KL = sum w log(S w). tau decreases as long as the effective number of responses per
    prompt, 1 / sum w^2, is 4 or more: an average over fewer says little.
    Returns {"tau": [...], "kl": [...], "reward": [...]}.
    """
    curve: dict[str, list[float]] = {"tau": [], "kl": [], "reward": []}
    count = rewards.shape[1]
    for tau in torch.logspace(2, -1, 61).tolist():
        logs = (rewards / tau).log_softmax(1)
        weights = logs.exp()
        if (1 / (weights**2).sum(1)).mean() < min(4, count / 2):
            break
        curve["tau"].append(tau)
        curve["kl"].append((weights * (logs + math.log(count))).sum(1).mean().item())
        curve["reward"].append((weights * rewards).sum(1).mean().item())
    return curve
