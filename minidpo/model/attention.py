"""Attention over packed rows: SDPA per text on the CPU, one FlexAttention mask on CUDA.

A row holds [prompt | response 1 | response 2 | ...] of each prompt. A query may attend to a key if both
belong to the same prompt, the key does not come later in the text, and the key is in the prompt or in the
query's own response.

Dimensions: N tokens of a packed row, H/K query/key heads, E head size.
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


def packed_attention(batch: PackedBatch) -> Attend:
    """The rule for one packed row, as the attention function of every layer."""
    if batch.tokens.device.type == "cuda":
        return masked_attention(shared_prompt_mask(batch.prompt, batch.response, batch.position))
    return attention_per_text(batch)


def attention_per_text(batch: PackedBatch) -> Attend:
    """The rule as one SDPA call per prompt and one per response, whose keys are its prompt's and its own.

    Attention runs in float32 even under autocast: on a CPU, attention in bf16 is slower and less exact.
    """
    sizes = np.diff(batch.bounds, axis=1)  # (P, K + 1): tokens of each prompt and of its responses
    pieces, responses = sizes.flatten().tolist(), sizes.shape[1] - 1

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        if not pieces:  # A row without pairs attends to nothing, but gradients (of zero) must flow.
            return q + (k.sum() + v.sum()).to(q.dtype)
        # One split of the whole row. If each piece were a slice, backward would add up N rows for every
        # slice.
        texts = zip(*(heads.to(q.dtype).split(pieces) for heads in (q, k, v)), strict=True)
        attended = []
        with torch.autocast(q.device.type, enabled=False):
            for q_prompt, k_prompt, v_prompt in texts:  # a prompt, then its responses
                attended.append(causal_attention(q_prompt[None], k_prompt[None], v_prompt[None])[0])
                for q_own, k_own, v_own in islice(texts, responses):
                    keys, values = torch.cat((k_prompt, k_own)), torch.cat((v_prompt, v_own))
                    attended.append(causal_attention(q_own[None], keys[None], values[None])[0])
        return torch.cat(attended)

    return attend


def shared_prompt_mask(prompt: Tensor, response: Tensor, position: Tensor) -> BlockMask:
    """The rule as a FlexAttention mask of N x N; arguments (N,) as in PackedBatch, N a multiple of BLOCK."""

    def may_attend(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_prompt = prompt[q] == prompt[k]
        not_later = position[k] <= position[q]
        own_text = (response[k] == 0) | (response[k] == response[q])
        return same_prompt & not_later & own_text

    # Which blocks can hold an allowed pair of tokens follows from the range of prompts and positions in each
    # block. create_block_mask would first write out the whole (N, N) rule, gigabytes at 16,384 tokens.
    (first, last), (earliest, latest) = _block_ranges(prompt), _block_ranges(position)
    some = (first[:, None] <= last) & (first <= last[:, None]) & (earliest <= latest[:, None])
    # In each row of blocks, the columns to compute come first.
    columns = (~some).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        some.sum(dim=1, dtype=torch.int32)[None, None],
        columns[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=may_attend,
        seq_lengths=(len(prompt), len(prompt)),
    )


def _block_ranges(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of every BLOCK values: (N,) -> two of (N / BLOCK,)."""
    return values.view(-1, BLOCK).amin(dim=1), values.view(-1, BLOCK).amax(dim=1)


def masked_attention(mask: BlockMask) -> Attend:
    """The rule as one FlexAttention call, in the dtype of v (bf16 under autocast)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        size = v.shape[-1]
        q, k, v = (heads.to(v.dtype).transpose(0, 1)[None] for heads in (q, k, v))  # (1, H, N, E)
        if size < SMALLEST_HEAD:  # zeros add nothing to a score
            q, k, v = (F.pad(heads, (0, SMALLEST_HEAD - size)) for heads in (q, k, v))
        flex = _flex_attention(q.device.type)
        attended = flex(q, k, v, block_mask=mask, scale=size**-0.5, enable_gqa=True)
        return attended[0, ..., :size].transpose(0, 1)

    return attend


@cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """Uncompiled FlexAttention stores the whole score matrix, which is right for tests on a CPU only."""
    if device_type != "cuda":
        return flex_attention
    # One graph serves rows of every length; with fullgraph PyTorch reports what it cannot compile.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
