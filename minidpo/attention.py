"""Who may look at whom: the shared-prompt rule, said once and computed in two ways.

A pair lies in the packed row as [prompt | chosen | rejected]. A query may attend to a key when both belong to
the same pair, the key does not come later in the text, and the key is in the prompt or in the query's own ending.
On CPU the rule is a list of `Segment`s, each one plain causal attention; on CUDA it is a FlexAttention mask.

Dimensions: N tokens of a packed row, S selected rows, H/K query/key heads, E head size.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention's block size: it skips what is masked in blocks of so many queries and keys
SMALLEST_HEAD = 16  # its CUDA kernel takes no smaller head size


class Segment(NamedTuple):
    """Consecutive query rows and the key rows before and under them: the last query stands on the last key."""

    queries: slice
    keys: tuple[slice, ...]


class TokenPlaces(NamedTuple):
    """For every token: its pair, its ending (0 prompt, 1 chosen, 2 rejected), its position in its own text."""

    pair: Tensor  # (N,)
    ending: Tensor  # (N,)
    position: Tensor  # (N,)

    def at(self, rows: Tensor) -> "TokenPlaces":
        return TokenPlaces(self.pair[rows], self.ending[rows], self.position[rows])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (..., Tq, H, E), k and v (..., Tk, K, E) -> (..., Tq, H, E); the last query stands on the last key.

    mask (..., 1, Tq, Tk) bool, true where a query may look, replaces the causal rule where it is given.
    """
    q, k, v = (heads.transpose(-3, -2) for heads in (q, k, v))  # (..., H, T, E)
    square = q.shape[-2] == k.shape[-2]
    if mask is None and not square and q.shape[-2] > 1:
        mask = lower_right_mask(q.shape[-2], k.shape[-2], q.device)
    attended = F.scaled_dot_product_attention(
        q, k.to(q.dtype), v.to(q.dtype), attn_mask=mask, is_causal=square and mask is None, enable_gqa=True
    )
    return attended.transpose(-3, -2)


def lower_right_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Tq, Tk) bool: query i may look at keys up to i + Tk - Tq."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def segment_attention(segments: list[Segment]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The rule as one SDPA call a segment; segments follow one another and cover all queries.

    Attention runs in float32 even under autocast: bf16 attention is slower than float32 on CPU, and less exact.
    """

    queries = [segment.queries for segment in segments]
    keys = [rows for segment in segments for rows in segment.keys]
    parts = [len(segment.keys) for segment in segments]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not segments:  # a row of no pairs: nothing to attend to, but gradients (of zero) must flow
            return q + (k.sum() + v.sum()).to(q.dtype)
        with torch.autocast(q.device.type, enabled=False):
            k_parts, v_parts = (iter(_at(heads.to(q.dtype), keys)) for heads in (k, v))
            return torch.cat([
                causal_attention(
                    q_rows[None],
                    torch.cat([next(k_parts) for _ in range(count)])[None],
                    torch.cat([next(v_parts) for _ in range(count)])[None],
                )[0]
                for q_rows, count in zip(_at(q, queries), parts, strict=True)
            ])  # fmt: skip

    return attend


def _at(x: Tensor, rows: list[slice]) -> list[Tensor]:
    """x[r] for every r; slices that meet are equal. One split for all of them: in backward each slice of its own
    would become a sum over the whole of x, and a row of many pairs would cost the square of its length."""
    cuts = sorted({0, len(x), *(r.start for r in rows), *(r.stop for r in rows)})
    pieces = dict(zip(cuts, x.split([b - a for a, b in pairwise(cuts)]), strict=False))
    return [pieces[r.start] for r in rows]


def shared_prompt_mask(queries: TokenPlaces, keys: TokenPlaces) -> BlockMask:
    """The rule as a FlexAttention mask of len(queries) x len(keys)."""

    def may_attend(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_pair = queries.pair[q] == keys.pair[k]
        not_later = keys.position[k] <= queries.position[q]
        own_text = (keys.ending[k] == 0) | (keys.ending[k] == queries.ending[q])
        return same_pair & not_later & own_text

    # Blocks that can hold an allowed pair of tokens, from each block's range of pairs and positions alone:
    # create_block_mask would first write out the whole (N, N) rule, gigabytes at 16,384 tokens.
    (q_first, q_last), (k_first, k_last) = _block_ranges(queries.pair), _block_ranges(keys.pair)
    (_, q_latest), (k_earliest, _) = _block_ranges(queries.position), _block_ranges(keys.position)
    some = (q_first[:, None] <= k_last) & (k_first <= q_last[:, None]) & (k_earliest <= q_latest[:, None])
    columns = (
        (~some).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    )  # the blocks that count come first
    return BlockMask.from_kv_blocks(
        some.sum(dim=1, dtype=torch.int32)[None, None],
        columns[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=may_attend,
        seq_lengths=(len(queries.pair), len(keys.pair)),
    )


def _block_ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of every `BLOCK` values: (N,) -> two of (blocks,). The last block repeats the last value."""
    whole = torch.cat((values, values[-1:].expand(-len(values) % BLOCK)))
    return whole.view(-1, BLOCK).amin(dim=1), whole.view(-1, BLOCK).amax(dim=1)


def masked_attention(mask: BlockMask) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The rule as one FlexAttention call under `mask`, in the dtype of v (bf16 under autocast)."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = v.shape[-1]
        widen = (0, max(0, SMALLEST_HEAD - size))  # with zeros, which add nothing to a score
        q, k, v = (
            F.pad(heads.to(v.dtype), widen).transpose(0, 1)[None] for heads in (q, k, v)
        )  # (1, H, N, E)
        flex = _flex_attention(q.device.type)
        attended = flex(q, k, v, block_mask=mask, scale=size**-0.5, enable_gqa=True)
        return attended[0, ..., :size].transpose(0, 1)

    return attend


@cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """Uncompiled FlexAttention stores the whole score matrix: right for tests on CPU, not for a GPU."""
    if device_type != "cuda":
        return flex_attention
    # One graph a query length, with and without gradients: more than the eight after which PyTorch stops compiling.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)
