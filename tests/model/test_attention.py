"""Attention over packed rows: the rule by hand, then SDPA per piece and FlexAttention against it."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

from families import FAMILIES
from minidpo.data import PairTokens
from minidpo.model import attention as attention_module
from minidpo.model.attention import (
    attention_in_bf16,
    attention_per_piece,
    masked_attention,
    shared_prompt_mask,
)
from minidpo.model.transformer import Attend, causal_attention
from minidpo.packing import BLOCK, PackedBatch, pack, padded
from tiny import EOS, random_pairs, tiny_model


def filled(attention, row: PackedBatch) -> Attend:
    """Attention on the row that a GPU gets, filled up to a whole block; the padding's results are dropped."""
    n, row = len(row.tokens), padded(row)
    attend, zeros = attention(row), (0, 0, 0, 0, 0, len(row.tokens) - n)
    return lambda q, k, v, layer: attend(*(F.pad(heads, zeros) for heads in (q, k, v)), layer)[:n]


FLEX, FLASH = partial(filled, masked_attention), partial(filled, attention_in_bf16)


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch):
    """PyTorch's `varlen_attn`, which exists on GPUs alone, as one causal attention per sequence; and
    FlexAttention without its compiler."""

    def varlen_attn(q, k, v, q_bounds, k_bounds, q_longest, k_longest, window_size):
        q_sizes, k_sizes = q_bounds.diff().tolist(), k_bounds.diff().tolist()
        assert (q_longest, k_longest) == (max(q_sizes), max(k_sizes)) and window_size == (-1, 0)
        sequences = zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes), strict=True)
        return torch.cat([causal_attention(*(heads[None] for heads in three))[0] for three in sequences])

    monkeypatch.setattr(attention_module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_module, "_flex_attention", lambda: flex_attention)


def random_heads(n: int, seed: int = 0) -> list[Tensor]:
    """q (n, 4, 8), k and v (n, 2, 8): two query heads share a key/value head."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, 8, generator=generator) for heads in (4, 2, 2)]


# Two prompts, of two tokens and one, with two responses each. A row is a query, a letter a key that it sees.
SEES = [
    "p.......",
    "pp......",
    "ppc.....",
    "ppcc....",
    "pp..r...",  # a rejected response sees the prompt, not the chosen response
    ".....p..",
    ".....pc.",
    ".....p.r",
]


@pytest.mark.parametrize("attention", [attention_per_piece, FLASH, FLEX])
def test_who_sees_whom(attention):
    """Another value of a token changes what comes out for those that see it, and for no other."""
    row = pack(PairTokens.from_responses([[3, 4], [5]], [[[6, EOS], [EOS]], [[7], [8]]]))
    q, k, v = random_heads(8)
    attend = attention(row)
    before = attend(q, k, v, 0)
    for token in range(8):
        changed = v.clone()
        changed[token] += 1
        moved = (attend(q, k, changed, 0) - before).abs().amax((1, 2)) > 1e-4
        assert moved.tolist() == [sees[token] != "." for sees in SEES]


def parts(row: PackedBatch) -> tuple[Tensor, Tensor]:
    """(N,) each: which prompt a token belongs to, and to which response of it (0: the prompt itself). Every
    padding token is a prompt of its own."""
    sizes = np.diff(row.bounds, axis=1)
    padding = np.arange(len(row.tokens) - sizes.sum())
    prompt, response = (np.repeat(numbers.flatten(), sizes.flatten()) for numbers in np.indices(sizes.shape))
    prompt, response = np.append(prompt, len(sizes) + padding), np.append(response, 0 * padding)
    return torch.from_numpy(prompt), torch.from_numpy(response)


def rule(row: PackedBatch) -> Tensor:
    """(N, N): which keys may a query see? Of its prompt, not later, in the prompt or its own response."""
    prompt, response = parts(row)
    not_later = row.position[:, None] >= row.position
    return (prompt[:, None] == prompt) & not_later & ((response == 0) | (response[:, None] == response))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, may: Tensor) -> Tensor:
    """q (Tq, H, E), k and v (N, G, E), may (Tq, N) -> (Tq, H, E), by the formula softmax(q k / sqrt(E)) v."""
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~may, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("responses", [1, 2, 3])
@pytest.mark.parametrize("attention", [partial(filled, attention_per_piece), FLASH, FLEX])
def test_values(attention, responses):
    """All ways give the formula's values, for heads of 8 too, where FlexAttention's kernel needs 16."""
    rng = np.random.default_rng(responses)
    prompts = [p.prompt for p in random_pairs(rng, 4)]
    texts = [[p.chosen for p in random_pairs(rng, responses)] for _ in prompts]
    row = pack(PairTokens.from_responses(prompts, texts))
    q, k, v = random_heads(len(row.tokens))
    assert_close(attention(row)(q, k, v, 0), plain_attention(q, k, v, rule(row)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "olmo2", "smollm3", "granite"])
def test_no_pairs(family):
    """A rank may get no pair of a batch: its pass gives every parameter a gradient of 0."""
    model, row = tiny_model(**FAMILIES[family]), pack(PairTokens.from_pairs([]))
    model.hidden_states(row.tokens, row.position, attention_per_piece(row)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.parameters())


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=["rotated", "no rope"])
def test_float32_under_autocast(q_dtype):
    """On a CPU attention is not computed in bf16, even where k and v come in it, or q too."""
    row = pack(PairTokens.from_responses([[3, 4]], [[[5, EOS], [6, EOS]]]))
    q, k, v = random_heads(6)
    attend = attention_per_piece(row)
    with torch.autocast("cpu", torch.bfloat16):
        attended = attend(q.to(q_dtype), k, v.bfloat16(), 0)
    assert torch.equal(attended, attend(q.to(q_dtype).float(), k, v.bfloat16().float(), 0))


# FlexAttention computes blocks of 128 x 128 tokens, and never looks at a block that is not listed: an allowed
# pair of tokens in it would be lost without an error.
SHAPES = {  # number of pairs, tokens of a prompt, tokens of a response
    "padding alone": (0, (1, 1), (1, 1)),
    "one pair over several blocks": (1, (1, 300), (1, 300)),
    "a long prompt": (2, (260, 400), (1, 20)),
    "pairs of any size": (12, (1, 150), (1, 150)),
}


def in_blocks(cells: Tensor) -> Tensor:
    """(N, N) -> (N / 128, N / 128): is there a true cell in the block?"""
    return cells.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(dim=3).any(dim=1)


def listed(counts: Tensor, indices: Tensor) -> Tensor:
    """What the kernel reads: the first counts[r] of indices[r] are the blocks of block row r."""
    table = torch.zeros(len(counts[0, 0]), len(counts[0, 0]), dtype=torch.int64)
    for r, count in enumerate(counts[0, 0].tolist()):
        table[r].index_add_(0, indices[0, 0, r, :count], torch.ones(count, dtype=torch.int64))
    assert table.max() == 1  # each block once
    return table.bool()


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks(shape):
    """All that hold an allowed pair of tokens are computed, in backward too, and none of strangers is."""
    for seed in range(8):
        pairs = PairTokens.from_pairs(random_pairs(np.random.default_rng(seed), *SHAPES[shape]))
        row = padded(pack(pairs))
        mask, allowed, token = shared_prompt_mask(row), rule(row), torch.arange(len(row.tokens))
        computed = listed(mask.kv_num_blocks, mask.kv_indices)
        assert not (in_blocks(allowed) & ~computed).any()
        prompt, _ = parts(row)
        assert not (computed & ~in_blocks(prompt[:, None] == prompt)).any()
        assert torch.equal(listed(mask.q_num_blocks, mask.q_indices), computed.T)
        # Inside them the mask is the rule, token by token: no block counts as computed without it.
        assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), token[:, None], token), allowed)
        assert mask.BLOCK_SIZE == (BLOCK, BLOCK) and mask.full_kv_num_blocks is None
