"""Which pairs a step draws, and how a batch is cut: every pair once per epoch, and no row is too long."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.data import PairOrder, micro_batches


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3), st.integers(0, 9))
def test_every_pair_once_per_epoch(pairs, batch_size, epochs, seed):
    """Every pair is drawn once per epoch, and only the last batch is smaller."""
    order = PairOrder(pairs, batch_size, epochs, 0, seed)
    batches = list(order)
    drawn = np.concatenate(batches)
    assert len(batches) == len(order) and len(drawn) == pairs * epochs
    for epoch in range(epochs):
        assert sorted(drawn[epoch * pairs : (epoch + 1) * pairs]) == list(range(pairs))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and len(batches[-1]) >= 1
    assert order.epoch(len(order)) == epochs and order.epoch(1) == len(batches[0]) / pairs


def test_pure_order():
    """The order is a pure function of seed and step."""
    order = PairOrder(100, 8, 2, 0, seed=5)
    np.random.seed(0)
    first = [batch.tolist() for batch in order]
    np.random.seed(1)
    assert [order[step].tolist() for step in reversed(range(25))][::-1] == first
    assert PairOrder(100, 8, 2, 0, seed=6)[0].tolist() != first[0]
    drawn = sum(first, [])
    assert len(drawn) == 200 and drawn[:100] != drawn[100:]  # each epoch has an order of its own


def test_order_of_old_runs():
    """The order of a seed is what it was in every earlier version, so that their runs can be resumed."""
    batches = [batch.tolist() for batch in PairOrder(7, 3, 1.5, 0, seed=5)]
    assert batches == [[1, 4, 2], [3, 6, 5], [0, 4, 2], [0]]


def test_end_of_the_run():
    """Fractional epochs and max_steps end in the middle, no step follows, and drawn is all pairs."""
    order = PairOrder(10, 4, 1.5, 0, seed=0)
    drawn = np.concatenate(list(order))
    assert len(drawn) == 15 and np.bincount(drawn).tolist().count(2) == 5
    with pytest.raises(IndexError):
        order[4]
    assert len(PairOrder(10, 4, 0.001, 0, seed=0)[0]) == 1
    short = PairOrder(100, 8, 0.5, 3, seed=5)
    assert len(short) == 3 and short.drawn().tolist() == sorted(np.concatenate(list(short)))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200))
def test_micro_batches(lengths, micro_tokens):
    """Micro-batches hold every pair, and no more than micro_tokens."""
    rows = np.random.default_rng(0).permutation(1000)[: len(lengths)]
    length_of = dict(zip(rows.tolist(), lengths, strict=True))
    parts = [part.tolist() for part in micro_batches(rows, np.array(lengths), micro_tokens)]
    assert sorted(sum(parts, [])) == sorted(rows.tolist())
    filled = [sum(length_of[row] for row in part) for part in parts]
    assert max(filled) <= micro_tokens
    assert len(parts) == 1 or sum(sorted(filled)[:2]) > micro_tokens  # no two would fit in one


def test_long_pair():
    """A pair longer than micro_tokens gets a row of its own, on one rank or several."""
    batch = np.array([5, 6, 7]), np.array([3, 90, 4]), 10
    assert [part.tolist() for part in micro_batches(*batch)] == [[6], [7, 5]]
    of_ranks = [[part.tolist() for part in micro_batches(*batch, rank, 2)] for rank in (0, 1)]
    assert of_ranks == [[[6]], [[7, 5]]]
