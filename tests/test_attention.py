"""The shared-prompt rule, computed in two ways, against the rule said by brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.attention import (
    Segment,
    causal_attention,
    lower_right_mask,
    masked_attention,
    segment_attention,
    shared_prompt_mask,
)
from minidpo.packing import PackedRow, PairTokens, Wanted, pack_row
from minidpo.tokenizer import TokenPair
from tiny import random_pairs, tiny_model

LOGPS = Wanted(chosen_logps=True, rejected_logps=True)
EVERYTHING = Wanted(chosen_logps=True, rejected_logps=True, rewards=True)
CHOSEN_ONLY = Wanted(chosen_logps=True)
REWARDS = Wanted(rewards=True)


def brute_force_rule(row: PackedRow) -> torch.Tensor:
    """(N, N) bool from the definition alone: same pair, key not later in its text, prompt or own ending."""
    pair, ending, position = (place.tolist() for place in row.places)
    n = len(pair)
    may = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for k in range(n):
            own_text = ending[k] == 0 or ending[k] == ending[q]
            may[q, k] = pair[q] == pair[k] and position[k] <= position[q] and own_text
    return may


def naive_attention(q, k, v, may):  # (Tq, H, E), (N, K, E) twice, (Tq, N) -> (Tq, H, E)
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~may, -torch.inf).softmax(-1), v)


def dense(mask, queries: int, keys: int) -> torch.Tensor:
    """(Tq, Tk) bool of a BlockMask, asked cell by cell."""
    q, k = torch.meshgrid(torch.arange(queries), torch.arange(keys), indexing="ij")
    return mask.mask_mod(torch.tensor(0), torch.tensor(0), q, k)


def test_the_rule_of_one_pair_is_this_table():
    row = pack_row(PairTokens.from_pairs([TokenPair([3, 4], [5, 2], [6, 2], 0)]), LOGPS)
    table = torch.tensor([
        # p  p  c  c  r  r
        [1, 0, 0, 0, 0, 0],  # p
        [1, 1, 0, 0, 0, 0],  # p
        [1, 1, 1, 0, 0, 0],  # c
        [1, 1, 1, 1, 0, 0],  # c
        [1, 1, 0, 0, 1, 0],  # r  sees the prompt, not the chosen ending
        [1, 1, 0, 0, 1, 1],  # r
    ]).bool()  # fmt: skip
    assert torch.equal(brute_force_rule(row), table)
    assert torch.equal(dense(shared_prompt_mask(row.places, row.places), 6, 6), table)


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.sampled_from([0, 150]))
def test_the_flex_mask_is_the_brute_force_rule(seed, n, pad_to):
    row = pack_row(PairTokens.from_pairs(random_pairs(np.random.default_rng(seed), n)), LOGPS, pad_to)
    every, size = brute_force_rule(row), len(row.tokens)
    assert torch.equal(dense(shared_prompt_mask(row.places, row.places), size, size), every)
    wanted = shared_prompt_mask(row.places.at(row.queries), row.places)
    assert torch.equal(dense(wanted, len(row.queries), size), every[row.queries])


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.sampled_from([LOGPS, EVERYTHING, CHOSEN_ONLY, REWARDS]),
)
def test_segments_equal_naive_masked_attention(seed, n, wanted):
    row = pack_row(PairTokens.from_pairs(random_pairs(np.random.default_rng(seed), n)), wanted)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(row.tokens), h, 8, generator=generator).double() for h in (4, 2, 2))
    may = brute_force_rule(row)
    for queries, segments in ((slice(None), row.segments), (row.queries, row.query_segments)):
        torch.testing.assert_close(
            segment_attention(segments)(q[queries], k, v), naive_attention(q[queries], k, v, may[queries])
        )


@pytest.mark.parametrize("wanted", [LOGPS, EVERYTHING, CHOSEN_ONLY, REWARDS])
def test_flex_attention_equals_segment_attention_in_the_whole_model(wanted):
    model = tiny_model(model_type="qwen3", qk_norm=True)
    pairs = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 6))
    plain, padded = pack_row(pairs, wanted), pack_row(pairs, wanted, pad_to=200)

    def hidden(row, attends):
        with torch.no_grad():
            return model.hidden_states(row.tokens, row.places.position, attends, row.queries)

    def flex(row):
        every = masked_attention(shared_prompt_mask(row.places, row.places))
        return [every, masked_attention(shared_prompt_mask(row.places.at(row.queries), row.places))]

    segments = hidden(plain, plain.attends(2))
    torch.testing.assert_close(hidden(plain, flex(plain)), segments, rtol=1e-5, atol=1e-5)
    assert len(padded.tokens) == 200 and len(padded.queries) % 128 == 0
    with_padding = hidden(padded, flex(padded))
    assert with_padding.isfinite().all()
    torch.testing.assert_close(with_padding[: len(segments)], segments, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pairs", "pad_to"), [(15, 0), (15, 512)])
def test_no_allowed_pair_of_tokens_lies_in_a_skipped_block_and_most_others_are_skipped(pairs, pad_to):
    rng = np.random.default_rng(0)
    row = pack_row(PairTokens.from_pairs(random_pairs(rng, pairs, (5, 20), (2, 12))), LOGPS, pad_to)
    for places in (row.places, row.places.at(row.queries)):
        computed = (
            shared_prompt_mask(places, row.places).to_dense()[0, 0].bool()
        )  # (query blocks, key blocks)
        tokens = computed.repeat_interleave(128, 0).repeat_interleave(128, 1)
        rule = brute_force_rule(row)[row.queries] if places is not row.places else brute_force_rule(row)
        assert not (rule & ~tokens[: len(rule), : rule.shape[1]]).any()
    assert shared_prompt_mask(row.places, row.places).to_dense().float().mean() < 0.7


def test_what_the_padding_holds_is_seen_by_nobody():
    model = tiny_model()
    row = pack_row(PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 3)), LOGPS, pad_to=128)
    every = masked_attention(shared_prompt_mask(row.places, row.places))
    used = int((row.places.pair < row.pairs).sum())
    scribbled = row.tokens.clone()
    scribbled[used:] = 7
    with torch.no_grad():
        clean = model.hidden_states(row.tokens, row.places.position, [every] * 2)
        dirty = model.hidden_states(scribbled, row.places.position, [every] * 2)
    assert torch.equal(clean[:used], dirty[:used]) and not torch.equal(clean[used:], dirty[used:])


@pytest.mark.parametrize("wanted", [LOGPS, EVERYTHING, CHOSEN_ONLY, REWARDS])
def test_a_padded_row_of_no_pairs_still_asks_something(wanted):
    """A rank may get no pair of a batch, but the compiled FlexAttention refuses to answer no query."""
    row = pack_row(PairTokens.from_pairs([]), wanted, pad_to=2048)
    assert len(row.tokens) == 2048 and len(row.queries) == 256 and not len(row.scored) and not len(row.last)


def test_causal_attention_puts_the_last_query_on_the_last_key():
    q, k, v = (torch.randn(1, 7, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    for queries in (7, 5, 1):
        may = torch.ones(7, 7).tril().bool()[7 - queries :]
        assert torch.equal(lower_right_mask(queries, 7, q.device), may)
        expected = naive_attention(q[0, 7 - queries :], k[0], v[0], may)
        torch.testing.assert_close(causal_attention(q[:, 7 - queries :], k, v)[0], expected)


def test_a_given_mask_replaces_the_causal_rule():
    q, k, v = (torch.randn(2, 5, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    may = torch.rand(2, 1, 5, 5) < 0.5
    may[..., 0] = True
    for row in (0, 1):
        expected = naive_attention(q[row], k[row], v[row], may[row, 0])
        torch.testing.assert_close(causal_attention(q, k, v, may)[row], expected)


def test_segment_attention_runs_in_float32_under_autocast():
    q, k, v = (torch.randn(6, h, 8) for h in (4, 2, 2))
    attend = segment_attention([Segment(slice(0, 6), (slice(0, 6),))])
    plain = attend(q, k, v.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attend(q, k, v.bfloat16())
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)
