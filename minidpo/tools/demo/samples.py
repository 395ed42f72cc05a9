"""Responses of a model to the world's unseen prompts, judged by rule."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minidpo.data import Tokenizer
from minidpo.files import require_file
from minidpo.model import Sampling, Transformer, generate, load_model
from minidpo.tools.demo.world import Judgement, judge
from minidpo.training.evaluate import divergences

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
