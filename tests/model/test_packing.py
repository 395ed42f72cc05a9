"""The packed row equals the textbook: two padded rows per pair, every logit, a full log-softmax.

So a pair's log-probs do not depend on the other pairs of the batch, nor on their order.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from minidpo.data import PairTokens, TokenPair
from minidpo.model import response_logps
from minidpo.packing import PackedBatch, pack, padded
from tiny import EOS, gradients, naive_logps, random_pairs, relative_difference, tiny_model

THREE_PAIRS = [
    TokenPair([3, 4, 5], [6, EOS], [7, 8, 9, EOS], 0),
    TokenPair([10], [11, 11, EOS], [EOS], 1),
    TokenPair([12, 3], [4, EOS], [13, 5, EOS], 2),
]


def packed(pairs: list[TokenPair], **responses: int) -> PackedBatch:
    return pack(PairTokens.from_pairs(pairs), **responses)


def test_row():
    """The example of packing.py: two pairs of 4+3+2 and 2+4+3 tokens."""
    pairs = [TokenPair([10, 11, 12, 13], [14, 15, EOS], [24, EOS], 0)]
    pairs += [TokenPair([30, 31], [32, 33, 34, EOS], [42, 43, EOS], 1)]
    row = packed(pairs)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, 15, EOS, 24, EOS, 30, 31, 32, 33, 34, EOS, 42, 43, EOS]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 0, 1, 2, 3, 4, 5, 2, 3, 4]
    # Token 3, the last of the prompt, predicts the first token of both responses; an EOS predicts nothing.
    assert row.predictor.tolist() == [3, 4, 5] + [3, 7] + [10, 11, 12, 13] + [10, 15, 16]
    assert row.targets.tolist() == [14, 15, EOS] + [24, EOS] + [32, 33, 34, EOS] + [42, 43, EOS]
    assert row.lengths.tolist() == [[3, 2], [4, 3]] and row.scored_responses == 2
    assert row.last.tolist() == [[6, 8], [14, 17]]
    assert row.bounds.tolist() == [[0, 4, 7, 9], [9, 11, 15, 18]]

    # Reward-model training needs log-probs of the chosen response only, but rewards of both.
    row = packed(pairs, scored=1)
    assert row.predictor.tolist() == [3, 4, 5] + [10, 11, 12, 13]
    assert row.targets.tolist() == [14, 15, EOS] + [32, 33, 34, EOS]
    assert row.scored_responses == 1 and row.last.tolist() == [[6, 8], [14, 17]]

    # SFT lays out the chosen response alone.
    row = packed(pairs, responses=1)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, 15, EOS, 30, 31, 32, 33, 34, EOS]
    assert row.predictor.tolist() == [3, 4, 5] + [8, 9, 10, 11]
    assert row.bounds.tolist() == [[0, 4, 7], [7, 9, 13]] and row.scored_responses == 1
    with pytest.raises(ValueError, match="3 responses of each prompt are needed, the data has 2"):
        packed(pairs, responses=3)


# Two prompts with tokens in their responses that the assistant did not write: 13 and 14, and 41.
TURNS = [
    TokenPair([10, 11], [12, 13, 14, EOS], [20, EOS], 0, unscored=(((1, 3),), ())),
    TokenPair([30], [31, EOS], [41, 42, EOS], 1, unscored=((), ((0, 1),))),
]


def test_row_of_turns():
    """A user's turn inside a response is in the row, but none of its tokens is a target or counted."""
    row = packed(TURNS)
    assert row.tokens.tolist() == [10, 11, 12, 13, 14, EOS, 20, EOS, 30, 31, EOS, 41, 42, EOS]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 0, 1, 2, 1, 2, 3]
    # Token 4, the last of the user's turn, predicts the EOS at 5; nothing predicts 41, at 11.
    assert row.predictor.tolist() == [1, 4] + [1, 6] + [8, 9] + [11, 12]
    assert row.targets.tolist() == [12, EOS] + [20, EOS] + [31, EOS] + [42, EOS]
    assert row.lengths.tolist() == [[2, 2], [2, 2]] and row.last.tolist() == [[5, 7], [10, 13]]
    assert row.bounds.tolist() == [[0, 2, 6, 8], [8, 9, 11, 14]]

    row = pack(PairTokens.from_pairs(TURNS), np.array([1, 0]), responses=1)
    assert row.predictor.tolist() == [0, 1] + [4, 7] and row.targets.tolist() == [31, EOS] + [12, EOS]
    row = packed(TURNS, scored=1)
    assert row.targets.tolist() == [12, EOS] + [31, EOS] and row.lengths.tolist() == [[2, 2], [2, 2]]
    assert packed([]).lengths.shape == pack(PairTokens.from_pairs(TURNS), np.array([], int)).lengths.shape


def test_padding():
    """A row is filled up to whole blocks of 128 tokens, and an empty one becomes a block."""
    row = padded(packed([TokenPair([10, 11], [12, EOS], [EOS], 0)]))
    assert row.tokens.tolist() == [10, 11, 12, EOS, EOS] + [0] * 123
    assert row.position.tolist() == [0, 1, 2, 3, 2] + [0] * 123
    assert len(padded(row).tokens) == len(padded(packed([])).tokens) == 128
    assert packed(TURNS).to(torch.device("meta")).tokens.shape == (128,)  # on any device but the CPU


def test_three_pairs(form=packed):
    """Log-probs of both responses, chosen first, are the textbook's (test_wrong_logps.py has wrong forms)."""
    model = tiny_model(dtype=torch.float64)
    assert_close(response_logps(model, form(THREE_PAIRS)), naive_logps(model, THREE_PAIRS))


ids = st.integers(0, 60)  # EOS and pad may stand inside a text
texts = st.one_of(st.lists(ids, min_size=1, max_size=2), st.lists(ids, min_size=1, max_size=40))
any_pair = st.builds(lambda *pair: TokenPair(*pair, index=0), texts, texts, texts)


@settings(deadline=None, max_examples=36)
@given(pairs=st.lists(any_pair, min_size=1, max_size=5))
def test_any_pairs(pairs):
    """Values and gradients equal the textbook's, to the rounding of float32 and of float64."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-11)):
        policy = tiny_model(dtype=dtype)
        ours, naive = response_logps(policy, packed(pairs)), naive_logps(policy, pairs)
        assert_close(ours, naive, rtol=tolerance, atol=tolerance)
        # Each response weighs differently, and all with one sign, or equal responses would cancel.
        weights = torch.linspace(0.5, 1.5, ours.numel(), dtype=dtype).view_as(ours) / len(pairs)
        of_ours, of_naive = (gradients(policy, (logps * weights).sum()) for logps in (ours, naive))
        assert relative_difference(of_ours, of_naive) < tolerance


@pytest.mark.parametrize("n", [1, 3, 5])
def test_n_responses(n):
    """A prompt laid out once with n responses gives each the log-prob that it has in a pair."""
    model, rng = tiny_model(dtype=torch.float64), np.random.default_rng(n)
    pairs = random_pairs(rng, 4)
    responses = [[p.chosen for p in random_pairs(rng, n)] for _ in pairs]
    row = pack(PairTokens.from_responses([p.prompt for p in pairs], responses))
    together = response_logps(model, row)  # (4, n)
    for k in range(n):
        kth = [p._replace(chosen=its[k]) for p, its in zip(pairs, responses, strict=True)]
        assert_close(together[:, k], naive_logps(model, kth)[:, 0], rtol=1e-12, atol=1e-12)
