"""Sampling of responses with a key/value cache, several prompts at a time.

Dimensions: R prompts, T tokens per prompt (padded on the left, so that all rows end together), V vocabulary,
H/K query/key heads, E head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.distributed import any_rank
from minidpo.model.transformer import Transformer, causal_attention
from minidpo.settings import Check, at_least, check_fields, not_negative, setting

Ids = Sequence[int]  # the tokens of one text


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = setting(128, "tokens after which a response is cut off", at_least(1))
    temperature: float = setting(1.0, "divides the logits; 0: the most likely token", not_negative)
    top_p: float = setting(1.0, "the fewest tokens of that mass", Check(lambda p: 0 < p <= 1, "in (0, 1]"))

    def __post_init__(self) -> None:
        check_fields("sampling", self)


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Sequence[Ids],
    sampling: Sampling,
    eos_id: int | None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The ids of one response per prompt, up to and including EOS, or max_new_tokens of them.

    Prompts of similar length run together; responses come back in the order of `prompts`. The same seed,
    prompts and batch size give the same responses. `progress` is called with the size of each finished batch.
    Raises ValueError for a prompt that is empty or leaves no room for max_new_tokens in the model's context.
    """
    lengths, new, limit = [*map(len, prompts)], sampling.max_new_tokens, model.config.max_length
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} has no tokens; generation needs one to start")
    if (most := max(lengths, default=0)) + new > limit:
        raise ValueError(f"a prompt of {most} tokens and max_new_tokens = {new} exceed the model's {limit}")
    generator = torch.Generator(device=model.output_weight.device).manual_seed(seed)
    by_length = sorted(range(len(prompts)), key=lengths.__getitem__)
    responses: dict[int, list[int]] = {}
    for start in range(0, len(prompts), batch_size):
        members = by_length[start : start + batch_size]
        drawn = _one_batch(model, [prompts[i] for i in members], sampling, eos_id, generator)
        responses |= zip(members, drawn, strict=True)
        progress(len(members))
    return [responses[i] for i in range(len(prompts))]


def _one_batch(
    model: Transformer, prompts: list[Ids], sampling: Sampling, eos_id: int | None, generator: torch.Generator
) -> list[list[int]]:
    device, width = model.output_weight.device, max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (R, T)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)  # (R,)
    positions = (torch.arange(width, device=device) - padding[:, None]).clamp(min=0)  # (R, T)
    cache = KeyValueCache(padding)
    alive = torch.ones_like(padding, dtype=torch.bool)
    generated: list[Tensor] = []
    for _ in range(sampling.max_new_tokens):
        hidden = model.hidden_states(tokens, positions, cache)
        drawn = draw(F.linear(hidden[:, -1], model.output_weight).float(), sampling, generator)  # (R,)
        generated.append(torch.where(alive, drawn, -1))  # -1 in rows that have ended before
        alive &= drawn != (-1 if eos_id is None else eos_id)
        # All ranks run a sharded model together, until the last row of the last rank has ended.
        if not any_rank(bool(alive.any())):
            break
        # The first pass ran over the whole prompts; every later one runs over the tokens just drawn.
        tokens, positions = drawn[:, None], positions[:, -1:] + 1  # (R, 1) each
    return [[token for token in row if token >= 0] for row in torch.stack(generated, dim=1).tolist()]


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token per row, from logits (R, V): (R,)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if the mass before it is below top_p; the most likely one always does.
        ranked = ranked.masked_fill(ranked.cumsum(dim=-1) - ranked >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


class KeyValueCache:
    """The attention of all layers during generation: it keeps keys and values, and hides padding."""

    def __init__(self, padding: Tensor) -> None:
        self._padding = padding  # (R,) the number of padding columns on each row's left
        self._past: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values (R, columns so far, K, E)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (R, new, H, E), k and v (R, new, K, E) of the new columns -> (R, new, H, E)."""
        if layer in self._past:
            k, v = (torch.cat(both, dim=1) for both in zip(self._past[layer], (k, v), strict=True))
        self._past[layer] = k, v
        columns = torch.arange(k.shape[1], device=q.device)
        own = columns[-q.shape[1] :, None]  # the column of each query, (new, 1)
        # A padding query attends to itself: its softmax must not be empty, and its result is never read.
        visible = (columns <= own) & (columns >= self._padding[:, None, None]) | (columns == own)
        return causal_attention(q, k, v, mask=visible[:, None])
