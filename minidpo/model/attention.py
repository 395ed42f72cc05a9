"""Attention over packed rows: SDPA per prompt and per response on the CPU, one call for all of them on CUDA.

A row holds [prompt | response 1 | response 2 | ...] of each prompt. The rule: a query may attend to a key if
both belong to the same prompt, the key does not come later in the text, and the key is in the prompt or in
the query's own response.

Dimensions: N tokens of a packed row, P prompts, K responses per prompt, H query heads, G key/value heads,
E head size.
"""

from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from minidpo.model.transformer import Attend, causal_attention
from minidpo.packing import BLOCK, PackedBatch, to_device

SMALLEST_HEAD = 16  # FlexAttention's CUDA kernel takes no smaller head size
# Of a GPU like the H100 or A100 a block of threads may use more shared memory than this, of others (L4, A10,
# RTX 3090 to 5090) 99 KiB.
LARGE_SHARED_MEMORY = 128 * 1024

# How attention is computed on CUDA, by the dtype of v (bf16 under autocast): "flash", "flex", or "sdpa",
# which is the only one that needs no particular GPU and no compiler. `choose_device` sets them.
KINDS = {torch.bfloat16: "flash", torch.float32: "flex"}


def packed_attention(batch: PackedBatch) -> Attend:
    """The rule for one packed row, as the attention function of every layer."""
    # Short matrix products are fast on a CPU. On a GPU one large call is faster than many small ones.
    if batch.tokens.device.type != "cuda":
        return attention_per_piece(batch)
    ways = {"flash": attention_in_bf16, "flex": masked_attention, "sdpa": attention_per_piece}
    way = cache(lambda kind: ways[kind](batch))  # made for the first layer, and then kept
    return lambda q, k, v, layer: way(KINDS.get(v.dtype, "sdpa"))(q, k, v, layer)


def attention_per_piece(batch: PackedBatch) -> Attend:
    """The rule as one SDPA call per piece (a prompt or a response), over its own keys and the prompt's."""
    sizes = np.diff(batch.bounds, axis=1)  # (P, K + 1): tokens of each prompt and of its responses
    lengths, (prompts, pieces_of_prompt) = sizes.flatten().tolist(), sizes.shape
    padding = len(batch.tokens) - sum(lengths)  # On a GPU a row is padded. Nobody reads what comes out there.

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        # A row without pairs has nothing to attend to. All weights must still get a gradient (of zero),
        # because the processes of a run add up their gradients together.
        if not lengths:
            return q + (k.sum() + v.sum()).to(q.dtype)
        # Rotation leaves q in float32; a layer without it leaves it in bf16 under autocast.
        dtype = torch.promote_types(q.dtype, torch.float32)
        # split, not slices: the backward pass of each slice would allocate a zero gradient of all N rows.
        pieces = zip(*(heads.to(dtype).split([*lengths, padding]) for heads in (q, k, v)), strict=True)
        attended = []
        # float32 even under autocast: on a CPU, attention in bf16 is slower and less exact.
        with torch.autocast(q.device.type, enabled=False):
            for q_prompt, k_prompt, v_prompt in islice(pieces, prompts):
                attended.append(causal_attention(q_prompt[None], k_prompt[None], v_prompt[None])[0])
                # The pieces that follow a prompt are its responses. The causal mask is aligned at the bottom
                # right, so every token of a response sees the whole prompt.
                for q_own, k_own, v_own in islice(pieces, pieces_of_prompt - 1):
                    keys, values = torch.cat((k_prompt, k_own)), torch.cat((v_prompt, v_own))
                    attended.append(causal_attention(q_own[None], keys[None], values[None])[0])
        q_padding, _, _ = next(pieces)
        return torch.cat((*attended, q_padding))

    return attend


def attention_in_bf16(batch: PackedBatch) -> Attend:
    """The rule as one FlashAttention call over all pieces. Its kernel takes 16 bits only.

    The keys of a response's piece are the prompt's and its own, so the prompt's are copied for each response.
    """
    index, queries, keys = [], [], []  # which keys each piece meets; how many queries and keys it has
    padding = [int(batch.bounds.max(initial=0)), len(batch.tokens)]  # from where to where: like a prompt
    for start, *ends in [*batch.bounds.tolist(), *([padding] if padding[1] > padding[0] else [])]:
        for begin, end in zip([start, *ends], ends, strict=False):
            prompt = np.arange(start, ends[0] if begin > start else start)  # Empty for the prompt itself.
            index += [prompt, np.arange(begin, end)]
            queries.append(end - begin)
            keys.append(len(prompt) + end - begin)
    device, q_longest, k_longest = batch.tokens.device, max(queries), max(keys)
    index_of_keys = to_device(torch.from_numpy(np.concatenate(index)), device)
    q_bounds, k_bounds = (
        to_device(torch.tensor([0, *np.cumsum(sizes)], dtype=torch.int32), device)
        for sizes in (queries, keys)
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        # float32 for the copies, because the gradients of all copies are added up.
        copies = (heads.float().index_select(0, index_of_keys).to(v.dtype) for heads in (k, v))
        # As many key heads as query heads: PyTorch before 2.12 has no option for fewer.
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in copies)
        # window_size (-1, 0): causal, aligned at the bottom right, as in `causal_attention`.
        sizes = q_bounds, k_bounds, q_longest, k_longest
        return cast(Tensor, varlen_attn(q.to(v.dtype), k, v, *sizes, window_size=(-1, 0)))

    return attend


def shared_prompt_mask(batch: PackedBatch) -> BlockMask:
    """The rule as a FlexAttention mask (N, N) of a row of N tokens, a multiple of BLOCK."""
    n, device = len(batch.tokens), batch.tokens.device
    sizes = np.diff(batch.bounds, axis=1)  # (P, K + 1): tokens of each prompt and of its responses
    of_prompt = sizes.sum(axis=1)
    padding = np.arange(of_prompt.sum(), n)  # Each padding token is a text of its own.
    ranges = (
        np.repeat(batch.bounds[:, :-1].flatten(), sizes.flatten()),  # where a token's own piece starts
        np.repeat(batch.bounds[:, 0], of_prompt),  # where its prompt starts and ends
        np.repeat(batch.bounds[:, 1], of_prompt),
    )
    # int32: the kernel keeps these in registers, of which int64 takes twice as many.
    table = np.stack([np.append(values, padding) for values in ranges]).astype(np.int32)  # (3, N)
    own, start, end = to_device(torch.from_numpy(table), device)

    def may_attend(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # Of a key only its index counts, so that nothing about keys is read in the kernel's inner loop.
        return (k <= q) & ((k >= own[q]) | ((k >= start[q]) & (k < end[q])))

    # Blocks that no query of a block may see are skipped. create_block_mask would write out the whole (N, N)
    # rule to find them.
    first = torch.arange(0, n, BLOCK, device=device)  # the first token of each block of keys
    earliest = start.view(-1, BLOCK).amin(dim=1)  # the first key that a block of queries may see
    needed = (first <= first[:, None]) & (first + BLOCK > earliest[:, None])
    # For each block of queries FlexAttention reads a count n and a list of key blocks, of which it computes
    # the first n. A stable sort puts the needed ones first.
    columns = (~needed).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        needed.sum(dim=1, dtype=torch.int32)[None, None],
        columns[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=may_attend,
        seq_lengths=(n, n),
    )


def masked_attention(batch: PackedBatch) -> Attend:
    """The rule as one FlexAttention call, in the dtype of v (bf16 under autocast)."""
    mask = shared_prompt_mask(batch)

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        size = v.shape[-1]
        # Rotation has left q and k in float32, but FlexAttention takes one dtype.
        q, k, v = (heads.to(v.dtype).transpose(0, 1)[None] for heads in (q, k, v))  # (1, H, N, E)
        # Zeros add nothing to the product of a query and a key.
        if size < SMALLEST_HEAD:
            q, k, v = (F.pad(heads, (0, SMALLEST_HEAD - size)) for heads in (q, k, v))
        flex = _flex_attention()
        # The scale is that of the head size before padding, as in `causal_attention`.
        options = _kernel_options(v.device, v.dtype, size)
        attended = flex(q, k, v, block_mask=mask, scale=size**-0.5, enable_gqa=True, kernel_options=options)
        return attended[0, ..., :size].transpose(0, 1)

    return attend


@cache
def _flex_attention() -> Callable[..., Tensor]:
    # Uncompiled it would store the whole score matrix.
    # dynamic: rows of every length share one graph. fullgraph: PyTorch reports what it cannot compile.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _kernel_options(device: torch.device, dtype: torch.dtype, head_size: int) -> dict[str, int] | None:
    """Smaller tiles where PyTorch's own do not fit the shared memory of the GPU; None: PyTorch's choice."""
    if device.type != "cuda" or head_size <= 64:
        return None
    gpu = torch.cuda.get_device_properties(device)
    if getattr(gpu, "shared_memory_per_block_optin", 0) >= LARGE_SHARED_MEMORY:
        return None
    tiles = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32} if dtype == torch.float32 else {}
    return tiles | {"fwd_num_stages": 2}
