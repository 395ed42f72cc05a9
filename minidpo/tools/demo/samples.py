"""Responses of a model to unseen prompts of the world, judged by rule; its true reward and KL, and the most
that any could earn."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minidpo.data import Tokenizer
from minidpo.files import require_file
from minidpo.model import Sampling, Transformer, generate, load_model
from minidpo.tools.demo.world import Judgement, judge
from minidpo.training.evaluate import divergences
from minidpo.training.reward_scorer import mean_and_error

LONGEST_RESPONSE = 40  # tokens; the longest in the data has about 25


class Samples(NamedTuple):
    """One response per prompt."""

    tokens: list[list[int]]  # EOS included, where there is one
    texts: list[str]
    judgements: list[Judgement]


class UnseenPrompts:
    """The test prompts of a world that the demo has written, and its SFT model, the reference."""

    def __init__(self, world: Path) -> None:
        file = require_file(
            world / "prompts.test.jsonl", f"{world} must be a directory that the demo has written"
        )
        self.prompts: list[str] = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
        self.tokenizer = Tokenizer.from_pretrained(world / "sft" / "final")
        self.reference = load_model(world / "sft" / "final")
        self._ids = [self.tokenizer.encode(prompt) for prompt in self.prompts]

    def sample(self, model: Transformer, seed: int = 0) -> Samples:
        """Sample at temperature 1, because the KL is about that distribution."""
        eos = self.tokenizer.eos_id
        tokens = generate(model, self._ids, Sampling(max_new_tokens=LONGEST_RESPONSE), eos, seed)
        texts = [self.tokenizer.decode([token for token in row if token != eos]) for row in tokens]
        return Samples(tokens, texts, list(map(judge, self.prompts, texts)))

    def kl(self, model: Transformer, samples: Samples) -> np.ndarray:
        """KL(model || reference) of each response, in nats."""
        return divergences(model, self.reference, self._ids, samples.tokens, torch.device("cpu"))


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
    # (samples, prompts) -> means and their errors over prompts
    of_rewards, of_kls = (mean_and_error(values.mean(axis=0, dtype=np.float64)) for values in (rewards, kls))
    return Point(step, *of_rewards, *of_kls, length=float(np.mean(lengths)))


def best_reachable(drawn: list[Samples]) -> dict[str, list[float]]:
    """The most reward that a KL buys, by reweighting the reference's own responses.

        pi*(y|x) = pi_ref(y|x) exp(r*(x, y) / tau) / Z(x)        has the most reward of all with its KL

    drawn: S times one response per prompt. Each of S to a prompt gets the weight w = softmax(r* / tau); then
    reward = sum w r* and KL = sum w log(S w). tau decreases as long as the effective number of responses per
    prompt, 1 / sum w^2, is 4 or more: an average over fewer says little.
    Returns {"tau": [...], "kl": [...], "reward": [...]}.
    """
    curve: dict[str, list[float]] = {"tau": [], "kl": [], "reward": []}
    of_samples = [[judged.reward for judged in one.judgements] for one in drawn]
    rewards, count = torch.tensor(of_samples, dtype=torch.float64).T, len(drawn)  # (prompts, S), nats
    for tau in torch.logspace(2, -1, 61).tolist():
        logs = (rewards / tau).log_softmax(1)
        weights = logs.exp()
        if (1 / (weights**2).sum(1)).mean() < min(4, count / 2):
            break
        curve["tau"].append(tau)
        curve["kl"].append((weights * (logs + math.log(count))).sum(1).mean().item())
        curve["reward"].append((weights * rewards).sum(1).mean().item())
    return curve
