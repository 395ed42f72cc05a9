"""Sampling responses with a key/value cache, several prompts at a time.

Dimensions: R prompts, T tokens per prompt (padded on the left, so that all rows end together), V vocabulary,
H query heads, G key/value heads, E head size.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.distributed import any_rank
from minidpo.errors import NOT_FINITE, UserError
from minidpo.model.transformer import Attend, Transformer, causal_attention
from minidpo.settings import Check, at_least, check_fields, not_negative, setting

COLDEST = 1e-20  # lower temperatures count as 0: logits divided by them would leave float32's range


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
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_id: int | Collection[int] | None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The ids of one response per prompt, up to and including EOS, or max_new_tokens of them.

    eos_id: the token, or tokens, that end a response; None: no token does. The same seed, prompts and batch
    size give the same responses. `progress` is called with the size of each finished batch.
    Raises ValueError for a prompt that is empty or leaves no room for max_new_tokens in the model's context.
    """
    lengths, new, limit = [*map(len, prompts)], sampling.max_new_tokens, model.config.max_length
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} has no tokens; generation needs one to start")
    if (most := max(lengths, default=0)) + new > limit:
        raise ValueError(f"a prompt of {most} tokens and max_new_tokens = {new} exceed the model's {limit}")
    generator = torch.Generator(device=model.model.embed_tokens.weight.device).manual_seed(seed)
    ends = [eos_id] if isinstance(eos_id, int) else [*(eos_id or ())]
    stops = torch.tensor(ends, dtype=torch.int64, device=generator.device)
    # Prompts of similar length run together, so that little is computed on padding.
    by_length = sorted(range(len(prompts)), key=lengths.__getitem__)
    responses: dict[int, list[int]] = {}
    for start in range(0, len(prompts), batch_size):
        members = by_length[start : start + batch_size]
        drawn = _one_batch(model, [prompts[i] for i in members], sampling, stops, generator)
        responses |= zip(members, drawn, strict=True)
        progress(len(members))
    # Back to the order of `prompts`.
    return [responses[i] for i in range(len(prompts))]


def _one_batch(
    model: Transformer,
    prompts: list[Sequence[int]],
    sampling: Sampling,
    stops: Tensor,
    generator: torch.Generator,
) -> list[list[int]]:
    # Padding is on the left, so that every row's last column holds its last token and the next token of all
    # rows goes into the same new column. Positions count from the first real token.
    device, width = stops.device, max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)  # (R, T)
    padding = torch.tensor([width - len(p) for p in prompts], device=device)  # (R,)
    positions = (torch.arange(width, device=device) - padding[:, None]).clamp(min=0)  # (R, T)
    attend = key_value_cache(padding)
    alive = torch.ones_like(padding, dtype=torch.bool)
    generated: list[Tensor] = []
    for _ in range(sampling.max_new_tokens):
        hidden = model.hidden_states(tokens, positions, attend)
        # Only the last column predicts something new.
        logits = F.linear(hidden[:, -1], model.output_weight.to(hidden.dtype)).float()  # (R, V)
        if not logits.isfinite().all():
            raise UserError(f"the model's numbers are not finite: {NOT_FINITE}")
        drawn = draw(logits, sampling, generator)  # (R,)
        # A row that has ended goes on being computed with the others; -1 marks what is not part of it.
        generated.append(torch.where(alive, drawn, -1))
        alive &= ~torch.isin(drawn, stops)
        # All ranks run a sharded model together, so all go on until the last row of the last rank has ended.
        if not any_rank(bool(alive.any())):
            break
        # The first pass runs over the whole prompts; later ones over the tokens just drawn, (R, 1), because
        # the keys and values of earlier tokens are in the cache.
        tokens, positions = drawn[:, None], positions[:, -1:] + 1
    return [[token for token in row if token >= 0] for row in torch.stack(generated, dim=1).tolist()]


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token per row, from logits (R, V): (R,)."""
    if sampling.temperature < COLDEST:
        return logits.argmax(dim=-1)
    # A temperature below 1 sharpens the distribution, one above 1 flattens it.
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it have less than top_p together; the most likely one always stays.
        ranked[:, 1:] *= (ranked.cumsum(dim=-1) - ranked < sampling.top_p)[:, 1:]
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def key_value_cache(padding: Tensor) -> Attend:
    """The attention of all layers during generation: it keeps keys and values, and masks padding.

    padding (R,): the number of padding columns on each row's left.
    """
    past: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: keys, values (R, columns so far, G, E)

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        # q, k and v are those of the new columns. Append the new keys and values to those of the others.
        if layer_index in past:
            k, v = (torch.cat(both, dim=1) for both in zip(past[layer_index], (k, v), strict=True))
        past[layer_index] = k, v
        # The mask: not later than the query, and not padding.
        columns = torch.arange(k.shape[1], device=q.device)
        own = columns[-q.shape[1] :, None]  # the column of each query, (new, 1)
        # A query that is padding attends to itself, because the softmax of nothing is NaN. It is never read.
        visible = (columns <= own) & (columns >= padding[:, None, None]) | (columns == own)
        return causal_attention(q, k, v, mask=visible[:, None])

    return attend
