"""A reward model asked about texts: what `score --reward-model` gives them, whatever model wrote them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minidpo.chat import ChatTemplate
from minidpo.dataset import longest_pair, require_fit
from minidpo.errors import UserError
from minidpo.formats import PreferencePair, Prompt
from minidpo.metrics import say
from minidpo.packing import PackedRow, PairTokens, Wanted
from minidpo.reference import of_every_pair
from minidpo.reward import RewardModel
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_reward_model

MICRO_TOKENS = 8192  # of one pass without gradients; more where one pair is longer


class Judge:
    """The reward model of a directory, with its own tokenizer."""

    def __init__(self, directory: str, device: torch.device) -> None:
        self._device = device
        self._model = load_reward_model(directory, device=device)
        self.tokenizer = Tokenizer.from_directory(directory)
        self.max_length = self._model.config.max_length
        require_fit("reward model", self._model.config, self.tokenizer, 2)

    def compare_template(self, template: ChatTemplate) -> None:
        """Warn where messages are written by `template` and the reward model has another of its own."""
        own = self.tokenizer.chat_template().form
        if own is not None and own != template.form:
            say(
                "warning: the reward model has another chat template than the messages are written by; unless it was"
                " trained on text like this, its rewards mean little"
            )

    def room(self, prompt: Prompt) -> int:
        """How many tokens of an ending, EOS included, the reward model can read after `prompt`."""
        return self.max_length - len(self.tokenizer.prompt_ids(prompt))

    def rewards(self, prompts: Sequence[Prompt], endings: Sequence[str]) -> list[float]:
        """What `score --reward-model` gives each ending of its prompt in text; of messages, the text is the sampler's.

        An ending stands in a pair with itself: what is computed twice is little beside the sampling.
        """
        texts = [
            PreferencePair(prompt.text, ending, ending, add_special_tokens=prompt.add_special_tokens)
            for prompt, ending in zip(prompts, endings, strict=True)
        ]
        ids = self.tokenizer.encode_pairs(texts)
        longest = max(len(pair.prompt) + len(pair.chosen) for pair in ids)
        if longest > self.max_length:  # its tokenizer may make more tokens of a sample than the sampler's
            raise UserError(
                f"a prompt and its sample have {longest} tokens, the reward model takes {self.max_length};"
                " sample fewer new tokens"
            )
        pairs = PairTokens.from_pairs(ids)
        micro_tokens = max(MICRO_TOKENS, longest_pair(pairs))
        rewards = all_rewards(self._model, pairs, micro_tokens, self._device, "fp32")[:, 0]
        if not np.isfinite(rewards).all():
            raise UserError(f"the reward model gives {rewards.sum()}: its weights are not whole")
        return rewards.tolist()


def all_rewards(
    model: RewardModel,
    pairs: PairTokens,
    micro_tokens: int,
    device: torch.device,
    dtype: str,
    label: str = "",
) -> np.ndarray:
    """Rewards of both endings of every pair: (pairs, 2) float32, chosen first."""

    def compute(row: PackedRow) -> Tensor:
        return model.pair_rewards(row)[0]

    return of_every_pair(compute, Wanted(rewards=True), pairs, micro_tokens, device, dtype, label)


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], completion: Sequence[int]) -> str:
    """A completion's text, decoded in its context: some decoders strip the space with which a text begins."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *completion])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(completion)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values (n,), and its standard error sqrt(variance / n)."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
