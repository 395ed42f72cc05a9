"""Sampling completions with a key/value cache, several prompts at a time.

Dimensions: R prompts, T tokens a prompt (padded on the left, so that all rows end together), V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.attention import causal_attention
from minidpo.distributed import any_rank
from minidpo.model import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy; top_p keeps the smallest set of that much mass."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_id: int | None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """Token ids that follow each prompt, up to and including EOS, or max_new_tokens of them.

    Prompts of like length run together; results come back in the order given. The same seed, prompts and batch
    size give the same samples. progress is told how many prompts each batch finished.
    Raises ValueError for an empty prompt, or one that leaves no room for max_new_tokens in the model's context.
    """
    longest = max(map(len, prompts), default=0)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(
            f"prompt {[len(p) for p in prompts].index(0)} has no tokens; generation needs one to start"
        )
    if longest + sampling.max_new_tokens > model.config.max_length:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {sampling.max_new_tokens} exceed the model's"
            f" {model.config.max_length}"
        )
    generator = torch.Generator(device=model.output_weight.device).manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(prompts), batch_size):
        members = by_length[start : start + batch_size]
        tokens = _one_batch(model, [prompts[i] for i in members], sampling, eos_id, generator)
        for i, row in zip(members, tokens, strict=True):
            completions[i] = row
        progress(len(members))
    return completions


def _one_batch(
    model: Transformer,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    eos_id: int | None,
    generator: torch.Generator,
) -> list[list[int]]:
    device, width = model.output_weight.device, max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (R, T)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)  # (R,)
    caches = [Cache(padding) for _ in range(model.config.num_hidden_layers)]
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    generated: list[Tensor] = []
    first = 0  # column of tokens[:, 0] among all columns so far
    for _ in range(sampling.max_new_tokens):
        columns = torch.arange(first, first + tokens.shape[1], device=device)
        positions = (columns - padding[:, None]).clamp(min=0)
        hidden = model.hidden_states(tokens, positions, caches)
        drawn = draw(F.linear(hidden[:, -1], model.output_weight).float(), sampling, generator)  # (R,)
        generated.append(torch.where(alive, drawn, -1))  # -1: this row ended before
        if eos_id is not None:
            alive &= drawn != eos_id
        if not any_rank(bool(alive.any())):  # a sharded model is run by all ranks together
            break
        first, tokens = first + tokens.shape[1], drawn[:, None]
    return [[token for token in row if token >= 0] for row in torch.stack(generated, dim=1).tolist()]


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token a row from logits (R, V): (R,)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p: the most likely one always does.
        ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


class Cache:
    """One layer's attention during generation: keys and values of all columns so far, padding hidden."""

    def __init__(self, padding: Tensor) -> None:
        self._padding = padding  # (R,) columns of padding on each row's left
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (R, new, H, E), k and v (R, new, K, E) of the new columns -> (R, new, H, E)."""
        self._keys = k if self._keys is None else torch.cat((self._keys, k), dim=1)
        self._values = v if self._values is None else torch.cat((self._values, v), dim=1)
        total, new = self._keys.shape[1], q.shape[1]
        columns = torch.arange(total, device=q.device)
        causal = columns <= columns[total - new :, None]  # (new, total)
        visible = causal & (columns >= self._padding[:, None, None])  # (R, new, total)
        # A padding query sees itself: its softmax must not be empty, and nobody looks at the result.
        visible |= columns == columns[total - new :, None]
        return causal_attention(q, self._keys, self._values, mask=visible[:, None])
