"""What the frontier measures: a policy's true reward and KL at one step, and the most that any policy could earn."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidpo.commands.answers import answer
from minidpo.commands.demo import unseen_prompts
from minidpo.evaluate import divergences
from minidpo.files import fingerprint
from minidpo.judge import mean_and_error
from minidpo.model import Transformer
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model, model_fingerprint


class Setting(NamedTuple):
    loss: str
    beta: float
    gamma: float | None = None  # simpo's

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.beta:g}" + (f"-{self.gamma:g}" if self.gamma is not None else "")


class Point(NamedTuple):
    """A policy at one step. Standard errors are over prompts: the answers to one prompt are averaged first."""

    step: int
    reward: float  # mean r* of its answers, nats
    reward_error: float
    kl: float  # KL(policy || reference) a response, nats: of next tokens, see evaluate.py
    kl_error: float
    kl_log_ratio: float  # the same by log-ratios, with more noise: the two should agree
    kl_log_ratio_error: float
    length: float  # words


class Judge:
    """Samples and judges a model's answers to the world's unseen prompts, `samples` to each."""

    def __init__(self, world: Path, samples: int, best_samples: int) -> None:
        directory = world / "sft" / "final"
        self.prompts, self.samples, self.best_samples = unseen_prompts(world), samples, best_samples
        self.tokenizer, self.reference = Tokenizer.from_directory(directory), load_model(directory)
        self.ids = [self.tokenizer.encode(prompt) for prompt in self.prompts]
        # What every number depends on but for the run itself.
        self.identity = {
            "reference": model_fingerprint(directory),
            "prompts": fingerprint(*self.prompts),
            "samples": [samples, best_samples],
        }

    def point(self, model: Transformer, step: int) -> Point:
        drawn = [answer(model, self.tokenizer, self.prompts, seed) for seed in range(self.samples)]
        apart = np.stack([self._divergences(model, answers.tokens) for answers in drawn])
        rewards = np.array([[j.reward for j in answers.judgements] for answers in drawn])
        reward, kl, kl_log_ratio = (
            over_prompts(values) for values in (rewards, apart[:, :, 1], apart[:, :, 0])
        )
        length = np.mean([[j.length for j in answers.judgements] for answers in drawn])
        return Point(step, *reward, *kl, *kl_log_ratio, float(length))

    def _divergences(self, model: Transformer, answers: list[list[int]]) -> np.ndarray:
        return divergences(model, self.reference, self.ids, answers, torch.device("cpu"), "fp32")

    def best(self) -> dict[str, list[float]]:
        """What no policy can beat: see `best_reachable`, from answers of the reference."""
        seeds = range(1000, 1000 + self.best_samples)  # others than those of its own point
        rewards = [
            [j.reward for j in answer(self.reference, self.tokenizer, self.prompts, seed).judgements]
            for seed in seeds
        ]
        return best_reachable(torch.tensor(rewards, dtype=torch.float64).T)


def over_prompts(values: np.ndarray) -> tuple[float, float]:
    """values (samples, prompts) -> mean, and its standard error over prompts."""
    return mean_and_error(values.mean(axis=0, dtype=np.float64))


def best_reachable(rewards: Tensor) -> dict[str, list[float]]:
    """The most reward that a KL buys, by reweighting the reference's own answers: rewards (prompts, samples), nats.

        pi*(y|x) = pi_ref(y|x) exp(r*(x, y) / tau) / Z(x)        has the most reward of all policies with its KL

    Each of S answers to a prompt gets the weight w = softmax(r* / tau); then reward = sum w r* and KL = sum w log(S w).
    tau goes down as long as the weights rest on 4 answers or more in the mean, 1 / sum w^2; beyond, few answers say
    little. Returns {"tau": [...], "kl": [...], "reward": [...]}.
    """
    curve: dict[str, list[float]] = {"tau": [], "kl": [], "reward": []}
    for tau in torch.logspace(2, -1, 61).tolist():
        logs = (rewards / tau).log_softmax(1)
        weights = logs.exp()
        if (1 / (weights**2).sum(1)).mean() < min(4, rewards.shape[1] / 2):
            break
        curve["tau"].append(tau)
        curve["kl"].append((weights * (logs + math.log(rewards.shape[1]))).sum(1).mean().item())
        curve["reward"].append((weights * rewards).sum(1).mean().item())
    return curve
