"""Attention over packed rows: SDPA per prompt and per response on the CPU, one FlexAttention mask on CUDA.

A row holds [prompt | response 1 | response 2 | ...] of each prompt. The rule: a query may attend to a key if
both belong to the same prompt, the key does not come later in the text, and the key is in the prompt or in
the query's own response.

Dimensions: N tokens of a packed row, P prompts, K responses per prompt, H query heads, G key/value heads,
E head size.
"""

from collections.abc import Callable
from functools import cache
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minidpo.model.transformer import Attend, causal_attention
from minidpo.packing import BLOCK, PackedBatch

SMALLEST_HEAD = 16  # FlexAttention's CUDA kernel takes no smaller head size
# Of a GPU like the H100 or A100 a block of threads may use more shared memory than this, of others (L4, A10,
# RTX 3090 to 5090) 99 KiB.
LARGE_SHARED_MEMORY = 128 * 1024

# How attention is computed on each kind of device: "flex" or "sdpa". `choose_device` sets that of "cuda".
KINDS = {"cuda": "flex"}


def packed_attention(batch: PackedBatch) -> Attend:
    """The rule for one packed row, as the attention function of every layer."""
    # Short matrix products are fast on a CPU. On a GPU one large call is faster than many small ones.
    if KINDS.get(batch.tokens.device.type) == "flex":
        return masked_attention(shared_prompt_mask(batch.prompt, batch.response, batch.position))
    return attention_per_piece(batch)


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


def shared_prompt_mask(prompt: Tensor, response: Tensor, position: Tensor) -> BlockMask:
    """The rule as a FlexAttention mask (N, N); arguments (N,) as in PackedBatch, N a multiple of BLOCK."""
    # The kernel keeps these in registers, of which int64 takes twice as many.
    prompt, response, position = (values.to(torch.int32) for values in (prompt, response, position))

    def may_attend(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        same_prompt = prompt[q_index] == prompt[k_index]
        not_later = position[k_index] <= position[q_index]
        own_text = (response[k_index] == 0) | (response[k_index] == response[q_index])
        return same_prompt & not_later & own_text

    # Blocks whose ranges of prompts or positions rule out any allowed pair of tokens are skipped.
    # create_block_mask would write out the whole (N, N) rule to find them.
    (first, last), (earliest, latest) = _block_ranges(prompt), _block_ranges(position)
    may_overlap = (first[:, None] <= last) & (first <= last[:, None]) & (earliest <= latest[:, None])
    # For each block of queries FlexAttention reads a count n and a list of key blocks, of which it computes
    # the first n. A stable sort puts the needed ones first.
    columns = (~may_overlap).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        may_overlap.sum(dim=1, dtype=torch.int32)[None, None],
        columns[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=may_attend,
        seq_lengths=(len(prompt), len(prompt)),
    )


def _block_ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of every block: (N,) -> two of (N / BLOCK,)."""
    return values.view(-1, BLOCK).amin(dim=1), values.view(-1, BLOCK).amax(dim=1)


def masked_attention(mask: BlockMask) -> Attend:
    """The rule as one FlexAttention call, in the dtype of v (bf16 under autocast)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
        size = v.shape[-1]
        # Rotation has left q and k in float32, but FlexAttention takes one dtype.
        q, k, v = (heads.to(v.dtype).transpose(0, 1)[None] for heads in (q, k, v))  # (1, H, N, E)
        # Zeros add nothing to the product of a query and a key.
        if size < SMALLEST_HEAD:
            q, k, v = (F.pad(heads, (0, SMALLEST_HEAD - size)) for heads in (q, k, v))
        flex = _flex_attention(q.device.type)
        # The scale is that of the head size before padding, as in `causal_attention`.
        options = _kernel_options(v.device, v.dtype, size)
        attended = flex(q, k, v, block_mask=mask, scale=size**-0.5, enable_gqa=True, kernel_options=options)
        return attended[0, ..., :size].transpose(0, 1)

    return attend


@cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled on CUDA."""
    # Uncompiled it stores the whole score matrix, which is good enough for the tests that run it on a CPU.
    if device_type != "cuda":
        return flex_attention
    # dynamic: rows of every length share one graph. fullgraph: PyTorch reports what it cannot compile.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _kernel_options(device: torch.device, dtype: torch.dtype, head_size: int) -> dict[str, int] | None:
    """Smaller tiles where PyTorch's own do not fit the shared memory of the GPU; None: PyTorch's choice."""
    if device.type != "cuda" or head_size <= 64 or _shared_memory(device) >= LARGE_SHARED_MEMORY:
        return None
    if dtype == torch.float32:
        return {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 32, "fwd_num_stages": 2}
    return {"fwd_num_stages": 2}


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a block of threads may use."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
