"""The shared-prompt rule, computed in two ways, against the rule said by brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.data import PairTokens, TokenPair
from minidpo.model.attention import attention_per_text, masked_attention, shared_prompt_mask
from minidpo.model.transformer import causal_attention
from minidpo.packing import PackedBatch, pack, padded
from tiny import random_pairs, tiny_model


def packed(seed: int, n: int, multiple: int = 1, **lengths) -> PackedBatch:
    row = pack(PairTokens.from_pairs(random_pairs(np.random.default_rng(seed), n, **lengths)))
    return padded(row, multiple)


def flex_mask(row: PackedBatch):
    return shared_prompt_mask(row.prompt, row.response, row.position)


def brute_force_rule(row: PackedBatch) -> torch.Tensor:
    """(N, N) bool from the definition alone: same prompt, key not later in its text, prompt or own response."""
    prompt, response, position = row.prompt.tolist(), row.response.tolist(), row.position.tolist()
    n = len(prompt)
    may = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            own_text = response[k] == 0 or response[k] == response[q]
            may[q, k] = prompt[q] == prompt[k] and position[k] <= position[q] and own_text
    return may


def naive_attention(q, k, v, may):  # (Tq, H, E), (N, K, E) twice, (Tq, N) -> (Tq, H, E)
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~may, -torch.inf).softmax(-1), v)


def dense(mask, size: int) -> torch.Tensor:
    """(N, N) bool of a BlockMask, asked cell by cell."""
    q, k = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k)


def test_one_pair_by_hand():
    """The rule of one pair is this table."""
    row = pack(PairTokens.from_pairs([TokenPair([3, 4], [5, 2], [6, 2], 0)]))
    table = torch.tensor(
        [
            # prompt chosen rejected
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],  # rejected attends to the prompt, not to the chosen response
            [1, 1, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(brute_force_rule(row), table)
    assert torch.equal(dense(flex_mask(padded(row, 128)), 128)[:6, :6], table)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_flex_mask_is_the_rule(seed, n):
    """The FlexAttention mask is the definition, padding included."""
    row = packed(seed, n, 128)
    assert torch.equal(dense(flex_mask(row), len(row.tokens)), brute_force_rule(row))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3))
def test_sdpa_per_text_is_the_rule(seed, n, responses):
    """One SDPA call per text equals masked attention spelled out, for any number of responses."""
    rng = np.random.default_rng(seed)
    texts = [[p.chosen for p in random_pairs(rng, responses)] for _ in range(n)]
    row = pack(PairTokens.from_responses([p.prompt for p in random_pairs(rng, n)], texts))
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(row.tokens), h, 8, generator=generator).double() for h in (4, 2, 2))
    expected = naive_attention(q, k, v, brute_force_rule(row))
    torch.testing.assert_close(attention_per_text(row)(q, k, v, 0), expected)


@pytest.mark.parametrize("head_dim", [8, 16])
def test_flex_equals_sdpa_in_the_model(head_dim):
    """Both ways give the same hidden states, heads below FlexAttention's smallest and padding included."""
    model = tiny_model(model_type="qwen3", qk_norm=True, head_dim=head_dim)
    row = packed(0, 6)
    with torch.no_grad():
        plain = model.hidden_states(row.tokens, row.position, attention_per_text(row))
        row = padded(row, 128)
        flex = model.hidden_states(row.tokens, row.position, masked_attention(flex_mask(row)))
    assert flex.isfinite().all() and len(flex) > len(plain)
    torch.testing.assert_close(flex[: len(plain)], plain, rtol=1e-5, atol=1e-5)


def test_most_blocks_are_skipped():
    """No allowed pair of tokens lies in a skipped block, and most other blocks are skipped."""
    row = packed(0, 15, 128, prompt=(5, 20), response=(2, 12))
    computed = flex_mask(row).to_dense()[0, 0].bool()  # (blocks, blocks)
    tokens = computed.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert not (brute_force_rule(row) & ~tokens).any()
    assert computed.float().mean() < 0.7


def test_padding_is_invisible():
    """What padding tokens hold changes no other hidden state."""
    model, row = tiny_model(), packed(0, 3, 128)
    attend, used = masked_attention(flex_mask(row)), int(row.bounds[-1, -1])
    scribbled = row.tokens.clone()
    scribbled[used:] = 7
    with torch.no_grad():
        clean = model.hidden_states(row.tokens, row.position, attend)
        dirty = model.hidden_states(scribbled, row.position, attend)
    assert torch.equal(clean[:used], dirty[:used]) and not torch.equal(clean[used:], dirty[used:])


def test_a_row_without_pairs():
    """A rank may get no pair of a batch: its pass computes nothing, and gives every parameter a gradient of 0."""
    model, row = tiny_model(), pack(PairTokens.from_pairs([]))
    model.hidden_states(row.tokens, row.position, attention_per_text(row)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.model.parameters())


def test_causal_mask_is_aligned_at_the_bottom_right():
    """The last query attends to all keys, the one before to all but the last."""
    q, k, v = (torch.randn(1, 7, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    for queries in (7, 5, 1):
        may = torch.ones(7, 7).tril().bool()[7 - queries :]
        expected = naive_attention(q[0, 7 - queries :], k[0], v[0], may)
        torch.testing.assert_close(causal_attention(q[:, 7 - queries :], k, v)[0], expected)


def test_a_mask_replaces_the_causal_rule():
    q, k, v = (torch.randn(2, 5, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    may = torch.rand(2, 1, 5, 5) < 0.5
    may[..., 0] = True
    for row in (0, 1):
        expected = naive_attention(q[row], k[row], v[row], may[row, 0])
        torch.testing.assert_close(causal_attention(q, k, v, may)[row], expected)


def test_attention_in_float32_under_autocast():
    """On the CPU attention is not computed in bf16."""
    row = pack(PairTokens.from_pairs([TokenPair([3, 4], [5, 2], [6, 2], 0)]))
    q, k, v = (torch.randn(6, h, 8) for h in (4, 2, 2))
    attend = attention_per_text(row)
    plain = attend(q, k, v.bfloat16().float(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attend(q, k, v.bfloat16(), 0)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)
