"""The packed row equals the textbook: two padded rows per pair, every logit, a full log-softmax.

And nothing else matters: batch mates, order, row length, chunk size, number of micro-batches.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.data import PairTokens, TokenPair, micro_batches
from minidpo.losses import DPO, PairLogps
from minidpo.model import RewardModel, response_logps
from minidpo.packing import pack, padded
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

ids = st.integers(0, 60)
texts = st.one_of(st.lists(ids, min_size=1, max_size=2), st.lists(ids, min_size=1, max_size=40))


@st.composite
def token_pairs(draw) -> list[TokenPair]:
    """Any ids at all (EOS and pad inside texts too), one-token parts, equal responses, long beside short."""
    pairs = []
    for index in range(draw(st.integers(1, 5))):
        prompt, chosen = draw(texts), draw(texts)
        rejected = draw(st.one_of(st.just(chosen), texts))
        pairs.append(TokenPair(prompt, chosen, rejected, index))
    return pairs


def packed(pairs: list[TokenPair], **responses):
    return pack(PairTokens.from_pairs(pairs), **responses)


def weighted_sum(logps: torch.Tensor) -> torch.Tensor:
    """One number whose gradient weighs every response differently. All have one sign: equal responses with
    opposite ones would cancel and leave rounding to be compared."""
    weights = torch.linspace(0.5, 1.5, logps.numel(), dtype=logps.dtype).view(logps.shape)
    return (logps * weights * torch.tensor([1.0, 0.7], dtype=logps.dtype)).sum() / len(logps)


def test_a_row_by_hand():
    """The example of packing.py's docstring, two pairs of 4+3+2 and 2+4+3 tokens, ids told apart by tens."""
    pairs = [TokenPair([10, 11, 12, 13], [14, 15, EOS], [24, EOS], 0)]
    pairs += [TokenPair([30, 31], [32, 33, 34, EOS], [42, 43, EOS], 1)]
    row = packed(pairs)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, 15, EOS, 24, EOS, 30, 31, 32, 33, 34, EOS, 42, 43, EOS]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 5, 2, 3, 4]
    assert row.response.tolist() == [0] * 4 + [1] * 3 + [2] * 2 + [0] * 2 + [1] * 4 + [2] * 3
    assert row.prompt.tolist() == [0] * 9 + [1] * 9
    # Token 3, the last of the prompt, predicts the first token of both responses; an EOS predicts nothing.
    assert row.predicts.tolist() == [3, 4, 5] + [3, 7] + [10, 11, 12, 13] + [10, 15, 16]
    assert row.targets.tolist() == [14, 15, EOS] + [24, EOS] + [32, 33, 34, EOS] + [42, 43, EOS]
    assert row.lengths.tolist() == row.scored_lengths.tolist() == [[3, 2], [4, 3]]
    assert row.last.tolist() == [[6, 8], [14, 17]]
    assert row.bounds.tolist() == [[0, 4, 7, 9], [9, 11, 15, 18]]
    # The reward model scores the chosen response alone, and reads rewards of both.
    row = packed(pairs, scored=1)
    assert row.predicts.tolist() == [3, 4, 5] + [10, 11, 12, 13]
    assert row.targets.tolist() == [14, 15, EOS] + [32, 33, 34, EOS]
    assert row.scored_lengths.tolist() == [[3], [4]] and row.last.tolist() == [[6, 8], [14, 17]]


def test_padding_by_hand():
    """Padding tokens are prompts of their own, and an empty row becomes one block of them."""
    row = padded(packed([TokenPair([10, 11], [12, EOS], [EOS], 0)]), 4)
    assert row.tokens.tolist() == [10, 11, 12, EOS, EOS, 0, 0, 0]
    assert row.prompt.tolist() == [0] * 5 + [1, 2, 3]
    assert row.response.tolist() == [0, 0, 1, 1, 2, 0, 0, 0] and row.position.tolist()[5:] == [0, 0, 0]
    assert len(padded(packed([]), 4).tokens) == 4 and len(padded(row, 4).tokens) == 8


@settings(deadline=None, max_examples=40)
@given(token_pairs())
def test_packed_equals_padded(pairs):
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
    model, pairs = tiny_model(**over), random_pairs(np.random.default_rng(0), 7, response=(1, 30))
    ours, naive = response_logps(model, packed(pairs)), naive_logps(model, pairs)
    torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-5)
    assert relative_difference(gradients(model, ours.mean()), gradients(model, naive.mean())) < 1e-5


def test_one_response_alone():
    """The chosen response scores the same when the rejected one is not laid out (SFT)."""
    model, pairs = tiny_model(), random_pairs(np.random.default_rng(0), 6)
    both, row = response_logps(model, packed(pairs)), packed(pairs, responses=1)
    assert len(row.tokens) == sum(len(p.prompt) + len(p.chosen) for p in pairs)
    torch.testing.assert_close(response_logps(model, row), both[:, :1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_any_number_of_responses(n):
    """A prompt laid out once with n responses gives each the log-prob that it has in a pair."""
    model, rng = tiny_model(dtype=torch.float64), np.random.default_rng(n)
    pairs = random_pairs(rng, 4)
    responses = [[p.chosen for p in random_pairs(rng, n)] for _ in pairs]
    row = pack(PairTokens.from_responses([p.prompt for p in pairs], responses))
    together = response_logps(model, row)
    assert together.shape == (4, n)
    for i, pair in enumerate(pairs):
        for k in range(n):
            alone = naive_logps(model, [pair._replace(chosen=responses[i][k])])[0, 0]
            torch.testing.assert_close(together[i, k], alone, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_batch_and_order_change_nothing(seed, micro_tokens):
    rng = np.random.default_rng(seed)
    pairs = random_pairs(rng, 12)
    model, tokens = tiny_model(dtype=torch.float64), PairTokens.from_pairs(pairs)
    with torch.no_grad():
        together = response_logps(model, pack(tokens))
        order = rng.permutation(12)
        for rows in micro_batches(order, tokens.tokens()[order], micro_tokens):
            part = response_logps(model, pack(tokens, rows))
            torch.testing.assert_close(part, together[rows], rtol=0, atol=1e-12)


def test_batch_changes_nothing_in_float32():
    model, pairs = tiny_model(), random_pairs(np.random.default_rng(1), 12)
    with torch.no_grad():
        together = response_logps(model, packed(pairs))
        for i, pair in enumerate(pairs):
            alone = response_logps(model, packed([pair]))[0]
            torch.testing.assert_close(alone, together[i], rtol=1e-6, atol=1e-6)


def test_micro_batches_add_up():
    policy, reference = tiny_model(seed=1), tiny_model(seed=2)
    tokens = PairTokens.from_pairs(random_pairs(np.random.default_rng(0), 16, response=(1, 40)))
    results = []
    for parts in (1, 2, 8):
        policy.zero_grad()
        for rows in np.array_split(np.arange(16), parts):
            row = pack(tokens, rows)
            with torch.no_grad():
                reference_logps = response_logps(reference, row)
            losses = DPO()(PairLogps(*response_logps(policy, row).T, *reference_logps.T))
            (losses.sum() / 16).backward()  # the size of the whole batch, whatever the part
        results.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    assert relative_difference(results[1], results[0]) < 1e-6
    assert relative_difference(results[2], results[0]) < 1e-6


def test_another_response_does_not_move_this_one():
    model = tiny_model()
    (pair,) = random_pairs(np.random.default_rng(0), 1, response=(5, 9))
    other = pair._replace(rejected=[7] * 20)
    logps, logps_beside_other = response_logps(model, packed([pair])), response_logps(model, packed([other]))
    torch.testing.assert_close(logps[0, 0], logps_beside_other[0, 0], rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(token_pairs())
def test_rewards_of_last_tokens(pairs):
    model = tiny_reward_model()
    naive = naive_rewards(model, pairs)
    rewards, nothing = model.forward_packed(packed(pairs, scored=0))
    assert nothing is None
    torch.testing.assert_close(rewards, naive, rtol=1e-5, atol=1e-5)
    with_logps, logps = model.forward_packed(packed(pairs, scored=1))
    torch.testing.assert_close(with_logps, naive, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logps[:, 0], naive_logps(model, pairs)[:, 0], rtol=1e-5, atol=1e-5)
    for pair, expected in zip(pairs, naive, strict=True):
        alone = model.forward_packed(packed([pair], scored=0))[0][0]
        torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)


def test_reward_gradients():
    pairs = random_pairs(np.random.default_rng(0), 6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        model = tiny_reward_model(dtype=dtype)
        ours = gradients(model, weighted_sum(model.forward_packed(packed(pairs, scored=0))[0]))
        naive = gradients(model, weighted_sum(naive_rewards(model, pairs)))
        assert relative_difference(ours, naive) < tolerance
        assert ours["lm_head.weight"].abs().max() == 0  # nothing but the score


def test_from_language_model():
    language_model = tiny_model(tie_word_embeddings=True)
    model = RewardModel.from_language_model(language_model)
    assert model.model.norm.weight is language_model.model.norm.weight
    heads = [RewardModel.from_language_model(language_model).score.weight for _ in range(200)]
    spread = torch.stack(heads).std().item()
    assert spread == pytest.approx((32 + 1) ** -0.5, rel=0.05)  # N(0, 1 / (hidden + 1))


def test_select():
    pairs = random_pairs(np.random.default_rng(0), 5)
    tokens = PairTokens.from_pairs(pairs)
    assert tokens.lengths.tolist() == [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]
    selected = tokens.select(np.array([3, 1]))
    assert selected.index.tolist() == [3, 1]
    expected = packed([pairs[3], pairs[1]])
    assert torch.equal(pack(selected).tokens, expected.tokens)
    assert len(PairTokens.from_pairs([])) == 0
