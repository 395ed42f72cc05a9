"""The packed row equals the textbook: two padded rows a pair, every logit, a full log-softmax.

And nothing else matters: batch mates, order, row length, chunk size, number of micro-batches.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.logprobs import response_logps
from minidpo.losses import dpo_loss
from minidpo.packing import PairTokens, Wanted, micro_batches, pack_row
from minidpo.reward import RewardModel
from minidpo.tokenizer import TokenPair
from tiny import (
    EOS,
    gradients,
    naive_logps,
    naive_rewards,
    random_pairs,
    relative_difference,
    tiny_model,
    tiny_reward_model,
)

LOGPS = Wanted(chosen_logps=True, rejected_logps=True)
REWARDS = Wanted(rewards=True)
ids = st.integers(0, 60)
endings = st.one_of(st.lists(ids, min_size=1, max_size=2), st.lists(ids, min_size=1, max_size=40))


@st.composite
def token_pairs(draw) -> list[TokenPair]:
    """Any ids at all (EOS and pad inside texts too), one-token parts, equal endings, long beside short."""
    pairs = []
    for index in range(draw(st.integers(1, 5))):
        prompt, chosen = draw(endings), draw(endings)
        rejected = draw(st.one_of(st.just(chosen), endings))
        pairs.append(TokenPair(prompt, chosen, rejected, index))
    return pairs


def packed(pairs: list[TokenPair], wanted: Wanted = LOGPS):
    return pack_row(PairTokens.from_pairs(pairs), wanted)


def weighted_sum(logps: torch.Tensor) -> torch.Tensor:
    """One number whose gradient weighs every ending differently. All of one sign: equal endings with opposite
    ones would cancel, and leave rounding to be compared."""
    weights = torch.linspace(0.5, 1.5, logps.numel(), dtype=logps.dtype).view(logps.shape)
    return (logps * weights * torch.tensor([1.0, 0.7], dtype=logps.dtype)).sum() / len(logps)


def test_a_row_by_hand():
    """The example of packing.py's docstring, two pairs of 4+3+2 and 2+4+3 tokens, ids told apart by tens."""
    pairs = [TokenPair([10, 11, 12, 13], [14, 15, EOS], [24, EOS], 0)]
    pairs += [TokenPair([30, 31], [32, 33, 34, EOS], [42, 43, EOS], 1)]
    row = packed(pairs)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, 15, EOS, 24, EOS, 30, 31, 32, 33, 34, EOS, 42, 43, EOS]
    assert row.places.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert row.places.ending.tolist() == [0] * 4 + [1] * 3 + [2] * 2 + [0] * 2 + [1] * 4 + [2] * 3
    assert row.places.pair.tolist() == [0] * 9 + [1] * 9
    # Row 3, the last prompt token, predicts the first token of both endings; an EOS predicts nothing.
    assert row.queries[row.scored].tolist() == [3, 4, 5] + [3, 7] + [10, 11, 12, 13] + [10, 15, 16]
    assert row.targets.tolist() == [14, 15, EOS] + [24, EOS] + [32, 33, 34, EOS] + [42, 43, EOS]
    assert row.scored_lengths.tolist() == [3, 2, 4, 3]
    rewards = packed(pairs, REWARDS)
    assert rewards.queries[rewards.last].tolist() == [[6, 8], [14, 17]]
    assert len(rewards.queries) == 4 and len(rewards.scored) == 0


@settings(deadline=None, max_examples=40)
@given(token_pairs())
def test_packed_logps_and_gradients_equal_the_padded_rows(pairs):
    for dtype, tolerance, grad_tolerance in ((torch.float32, 1e-5, 1e-5), (torch.float64, 1e-12, 1e-11)):
        model = tiny_model(dtype=dtype, qkv_bias=True)
        ours, naive = response_logps(model, packed(pairs)), naive_logps(model, pairs)
        torch.testing.assert_close(ours, naive, rtol=tolerance, atol=tolerance)
        difference = relative_difference(
            gradients(model, weighted_sum(ours)), gradients(model, weighted_sum(naive))
        )
        assert difference < grad_tolerance


@pytest.mark.parametrize("family", ["qwen3 tied", "mistral, three layers", "one layer"])
def test_packed_equals_padded_in_other_models(family):
    over = {
        "qwen3 tied": dict(model_type="qwen3", qk_norm=True, head_dim=16, tie_word_embeddings=True),
        "mistral, three layers": dict(model_type="mistral", num_hidden_layers=3),
        "one layer": dict(num_hidden_layers=1),
    }[family]
    model, pairs = tiny_model(**over), random_pairs(np.random.default_rng(0), 7, ending=(1, 30))
    ours, naive = response_logps(model, packed(pairs)), naive_logps(model, pairs)
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-5)
    assert relative_difference(gradients(model, ours.mean()), gradients(model, naive.mean())) < 1e-5


@pytest.mark.parametrize("wanted", [Wanted(chosen_logps=True), Wanted(rejected_logps=True)])
def test_one_ending_alone_scores_as_it_does_beside_the_other(wanted):
    model, pairs = tiny_model(), random_pairs(np.random.default_rng(0), 6)
    both = response_logps(model, packed(pairs))
    alone = response_logps(model, packed(pairs, wanted))
    assert alone.shape == (6, 1)
    column = both[:, :1] if wanted.chosen_logps else both[:, 1:]
    torch.testing.assert_close(alone, column, rtol=0, atol=1e-5)
    if wanted.chosen_logps:  # the rejected ending is not even laid out
        laid_out = sum(len(p.prompt) + len(p.chosen) for p in pairs)
        assert len(packed(pairs, wanted).tokens) == laid_out


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_batch_mates_order_and_micro_tokens_change_nothing(seed, micro_tokens):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, 12)
    model, tokens = tiny_model(dtype=torch.float64), PairTokens.from_pairs(pairs)
    with torch.no_grad():
        together = response_logps(model, pack_row(tokens, LOGPS))
        order = rng.permutation(12)
        for rows in micro_batches(order, tokens.lengths.sum(1)[order], micro_tokens):
            part = response_logps(model, pack_row(tokens.select(rows), LOGPS))
            torch.testing.assert_close(part, together[rows], rtol=0, atol=1e-12)


def test_batch_mates_change_nothing_beyond_1e_6_in_float32():
    model, pairs = tiny_model(), random_pairs(np.random.default_rng(1), 12)
    with torch.no_grad():
        together = response_logps(model, packed(pairs))
        for i, pair in enumerate(pairs):
            alone = response_logps(model, packed([pair]))[0]
            torch.testing.assert_close(alone, together[i], rtol=1e-6, atol=1e-6)


def test_gradients_of_1_2_and_8_micro_batches_agree():
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    tokens = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 16, ending=(1, 40)))
    results = []
    for parts in (1, 2, 8):
        policy.zero_grad()
        for rows in np.array_split(np.arange(16), parts):
            row = pack_row(tokens.select(rows), LOGPS)
            with torch.no_grad():
                reference_logps = response_logps(reference, row)
            losses = dpo_loss(*response_logps(policy, row).T, *reference_logps.T).losses
            (losses.sum() / 16).backward()  # the whole batch's count, whatever the part
        results.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    assert relative_difference(results[1], results[0]) < 1e-6
    assert relative_difference(results[2], results[0]) < 1e-6


def test_another_ending_does_not_move_this_one():
    model = tiny_model()
    (pair,) = random_pairs(np.random.default_rng(0), 1, ending=(5, 9))
    other = pair._replace(rejected=[7] * 20)
    logps, logps_beside_other = response_logps(model, packed([pair])), response_logps(model, packed([other]))
    torch.testing.assert_close(logps[0, 0], logps_beside_other[0, 0], rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(token_pairs())
def test_rewards_equal_the_score_of_each_texts_last_token_alone_and_in_any_batch(pairs):
    model = tiny_reward_model()
    naive = naive_rewards(model, pairs)
    rewards, nothing = model.pair_rewards(packed(pairs, REWARDS))
    assert nothing is None
    torch.testing.assert_close(rewards, naive, rtol=1e-5, atol=1e-5)
    with_logps, logps = model.pair_rewards(packed(pairs, Wanted(chosen_logps=True, rewards=True)))
    torch.testing.assert_close(with_logps, naive, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps, naive_logps(model, pairs)[:, 0], rtol=1e-5, atol=1e-5)
    for pair, expected in zip(pairs, naive, strict=True):
        alone = model.pair_rewards(packed([pair], REWARDS))[0][0]
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)


def test_reward_gradients_equal_the_naive_ones():
    pairs = random_pairs(np.random.default_rng(0), 6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        model = tiny_reward_model(dtype=dtype)
        ours = gradients(model, weighted_sum(model.pair_rewards(packed(pairs, REWARDS))[0]))
        naive = gradients(model, weighted_sum(naive_rewards(model, pairs)))
        assert relative_difference(ours, naive) < tolerance
        assert ours["lm_head.weight"].abs().max() == 0  # nothing but the score


def test_a_reward_model_made_of_a_language_model_keeps_its_weights_under_a_fresh_head():
    language_model = tiny_model(tie_word_embeddings=True)
    model = RewardModel.from_language_model(language_model)
    assert model.model.norm.weight is language_model.model.norm.weight
    heads = [RewardModel.from_language_model(language_model).score.weight for _ in range(200)]
    spread = torch.stack(heads).std().item()
    assert spread == pytest.approx((32 + 1) ** -0.5, rel=0.05)  # N(0, 1 / (hidden + 1))


def test_pair_tokens_keep_pairs_apart_and_select_in_order():
    pairs = random_pairs(np.random.default_rng(0), 5)
    tokens = PairTokens.from_pairs(pairs)
    assert tokens.lengths.tolist() == [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]
    selected = tokens.select(np.array([3, 1]))
    assert selected.index.tolist() == [3, 1]
    expected = packed([pairs[3], pairs[1]])
    assert torch.equal(pack_row(selected, LOGPS).tokens, expected.tokens)
    assert len(PairTokens.from_pairs([])) == 0
