"""A reward model that is asked about texts: it gives them what `score --reward-model` does."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minidpo.data import ChatTemplate, PairTokens, Prompt, Tokenizer, require_fit
from minidpo.errors import UserError
from minidpo.files import read_object
from minidpo.log import print0
from minidpo.model import load_reward_model
from minidpo.training.scoring import MICRO_TOKENS, all_rewards, require_finite


class RewardScorer:
    """The reward model of a directory, with its own tokenizer."""

    def __init__(self, directory: str, device: torch.device) -> None:
        self._directory, self._device = Path(directory), device
        # Between two calls of `rewards` it waits in main memory, and a policy in training has the GPU's.
        self._model = load_reward_model(directory, device=torch.device("cpu"))
        self.tokenizer = Tokenizer.from_pretrained(directory, rewards=True)
        self.max_length = self._model.config.max_length
        require_fit("reward model", self._model.config, self.tokenizer, 2)

    def compare(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        """Tell if its tokenizer or chat template is not the model's. template: None without messages."""
        if conflict := self.tokenizer.conflict(tokenizer):
            print0(f"the reward model has another tokenizer than the model ({conflict}); it reads the text")
        if template:
            compare_template(self._directory, self.tokenizer, template)

    def room(self, prompt: Prompt) -> int:
        """How many tokens of a response, EOS included, can be read after `prompt`."""
        after_eos = max(0, len(self.tokenizer.encode(prompt.tail or "", add_special_tokens=False)) - 1)
        return self.max_length - len(self.tokenizer.prompt_ids(prompt)) - after_eos

    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """The reward of each response, float32. Of messages, the prompt is the text that was sampled from.

        responses: the same number K for each of the P prompts, one prompt's after the other's: (P * K,).
        """
        k = len(responses) // len(prompts)
        grouped = [responses[i : i + k] for i in range(0, len(responses), k)]
        pairs = PairTokens.from_responses(*self.tokenizer.encode_responses(prompts, grouped))
        longest = int((pairs.lengths[:, 0] + pairs.lengths[:, 1:].max(axis=1)).max())
        if longest > self.max_length:  # Its tokenizer may make more tokens of a sample than the sampler's.
            raise UserError(
                f"a prompt and its sample have {longest} tokens, the reward model takes {self.max_length};"
                " sample fewer new tokens"
            )
        try:
            model = self._model.to(self._device)
            rewards = all_rewards(model, pairs, MICRO_TOKENS, self._device, "fp32").ravel()
        finally:
            self._model.to("cpu")
        require_finite(rewards, self._directory)
        return rewards


def compare_template(directory: Path, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Warn where messages are written by `template` and the reward model was trained otherwise."""
    own, what = tokenizer.chat_template().form, "has another chat template than the messages are written by"
    if own and read_object(directory / "config.json").get("reward_read_at") == "EOS of text":
        own, what = None, "was trained on text, not on messages written by its chat template"
    # Without a template it was trained on text, and only hh is written like a kind of text.
    if own != template.form and not (own is None and template.kind == "hh"):
        unless = "unless it was trained on text like this, its rewards mean little"
        print0(f"warning: the reward model {what}; {unless}")


def text_after(
    tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int], special_tokens: bool = False
) -> str:
    """The text of a response, decoded after its prompt: some decoders strip a text's leading space."""
    before, whole = (tokenizer.decode(ids, special_tokens) for ids in (prompt, [*prompt, *response]))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(response, special_tokens)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean of independent values (n,), and its standard error: sqrt(variance / n), where the variance
    divides by n - 1. One value has none: NaN."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def with_error(values: np.ndarray, form: str) -> str:
    """The mean and its standard error, "0.500 ± 0.177" for the format ".3f"; of one value the mean."""
    mean, error = mean_and_error(values)
    return f"{mean:{form}}" + ("" if math.isnan(error) else f" ± {error:{form.lstrip('0123456789')}}")
