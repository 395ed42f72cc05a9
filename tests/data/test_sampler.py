"""Which pairs a step draws, and how its batch is cut: every pair once per epoch, and no row is too long."""

import numpy as np
import pytest

from minidpo.data import PairOrder, micro_batches


def lists(arrays) -> list[list[int]]:
    return [array.tolist() for array in arrays]


def test_order():
    """Each epoch draws every pair once, in an order of its own that depends on the seed alone."""
    # 7 pairs in 1.5 epochs are 10 draws, 3 per step. All versions drew these numbers, so old runs can resume.
    order = PairOrder(pairs=7, batch_size=3, epochs=1.5, max_steps=0, seed=5)
    assert lists(order) == [[1, 4, 2], [3, 6, 5], [0, 4, 2], [0]]
    drawn = sum(lists(order), [])
    assert sorted(drawn[:7]) == list(range(7)) and drawn[7:] != drawn[:3]
    assert [order[step].tolist() for step in (3, 0)] == [[0], [1, 4, 2]]  # in any order of asking
    assert [order.epoch(step) for step in (0, 2, 4)] == [0, 6 / 7, 10 / 7]
    assert lists(PairOrder(7, 3, 1.5, 0, seed=6)) != lists(order)


def test_end_of_the_run():
    """A run ends with max_steps or a part of an epoch, and draws at least one pair."""
    short = PairOrder(pairs=100, batch_size=8, epochs=0.5, max_steps=3, seed=5)
    assert len(short) == 3 and short.drawn().tolist() == sorted(np.concatenate(list(short)))
    with pytest.raises(IndexError):
        short[3]
    assert [len(batch) for batch in PairOrder(10, 4, 0.001, 0, seed=0)] == [1]


@pytest.mark.parametrize(
    ("tokens", "alone", "of_two_ranks"),
    [
        ([7, 4, 3], [[0, 2], [1]], [[[0]], [[1, 2]]]),  # Alone, 3 goes where the least is left over.
        ([3, 90, 4], [[1], [2, 0]], [[[1]], [[2, 0]]]),  # A pair of 90 tokens gets a row of its own.
        # Alone each of both 3 goes where 7 and 6 left most room, and none is opened for the last.
        ([7, 6, 6, 4, 3, 3], [[0, 4], [1, 3], [2, 5]], [[[0], [2]], [[1, 5], [3, 4]]]),
        # Alone 6 + 4 and 4 + 3 + 3. Filled evenly, 6 + 3 and 4 + 4 leave no room for the last 3: more rows.
        ([6, 4, 4, 3, 3], [[0, 1], [2, 3, 4]], [[[0], [2]], [[1], [3, 4]]]),
    ],
)
def test_ranks(tokens, alone, of_two_ranks):
    """A batch is cut into few rows of at most 10 tokens; two ranks share it evenly, in equally many rows."""
    batch = np.arange(len(tokens)), np.array(tokens), 10
    assert lists(micro_batches(*batch)) == alone
    assert [lists(micro_batches(*batch, rank, 2)) for rank in (0, 1)] == of_two_ranks
