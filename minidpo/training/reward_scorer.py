"""A reward model that is asked about texts: it gives them what `score --reward-model` does."""

from collections.abc import Sequence

import numpy as np
import torch

from minidpo.data import ChatTemplate, PairTokens, Prompt, Tokenizer, longest_pair, require_fit
from minidpo.errors import UserError
from minidpo.log import print0
from minidpo.model import load_reward_model
from minidpo.training.scoring import MICRO_TOKENS, all_rewards


class RewardScorer:
    """The reward model of a directory, with its own tokenizer."""

    def __init__(self, directory: str, device: torch.device) -> None:
        self._device = device
        self._model = load_reward_model(directory, device=device)
        self.tokenizer = Tokenizer.from_pretrained(directory)
        self.max_length = self._model.config.max_length
        require_fit("reward model", self._model.config, self.tokenizer, 2)

    def compare_template(self, template: ChatTemplate) -> None:
        """Warn where messages are written by `template` and the reward model has another one of its own."""
        own = self.tokenizer.chat_template().form
        if own is not None and own != template.form:
            print0(
                "warning: the reward model has another chat template than the messages are written by;"
                " unless it was trained on text like this, its rewards mean little"
            )

    def room(self, prompt: Prompt) -> int:
        """How many tokens of a response, EOS included, the reward model can read after `prompt`."""
        return self.max_length - len(self.tokenizer.prompt_ids(prompt))

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """The reward of each response, float32. Of messages, the prompt is the text that was sampled from.

        responses: the same number K for each of the P prompts, one prompt's after the other's: (P * K,).
        """
        k = len(responses) // len(prompts)
        grouped = [responses[i : i + k] for i in range(0, len(responses), k)]
        ids = self.tokenizer.encode_responses(prompts, grouped)
        pairs = PairTokens.from_responses(*ids)
        longest = int((pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)).max())
        if longest > self.max_length:  # Its tokenizer may make more tokens of a sample than the sampler's.
            raise UserError(
                f"a prompt and its sample have {longest} tokens, the reward model takes {self.max_length};"
                " sample fewer new tokens"
            )
        if longest_pair(pairs) > MICRO_TOKENS:  # Each response gets a prompt of its own, to fit in one pass.
            repeated = [prompt for prompt in ids[0] for _ in range(k)]
            pairs = PairTokens.from_responses(repeated, [[response] for its in ids[1] for response in its])
        rewards = all_rewards(self._model, pairs, MICRO_TOKENS, self._device, "fp32").ravel()
        if not np.isfinite(rewards).all():
            raise UserError(f"the reward model gives {rewards.sum()}: its weights are not finite numbers")
        return rewards


def text_after(tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int]) -> str:
    """The text of a response, decoded after its prompt: some decoders strip a text's leading space."""
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *response])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(response)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values (n,), and its standard error sqrt(variance / n)."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
