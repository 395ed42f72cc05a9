"""Which pairs a step takes and how a batch is cut into rows: every pair once an epoch, no row longer than it may be."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpo.packing import batch_rows, drawn_rows, micro_batches, padded_pass, total_draws


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 3), st.integers(0, 9))
def test_every_pair_is_drawn_once_an_epoch(pairs, batch_size, epochs, seed):
    steps = -(-pairs * epochs // batch_size)
    batches = [batch_rows(step, pairs, batch_size, epochs, seed) for step in range(steps)]
    drawn = np.concatenate(batches)
    assert len(drawn) == total_draws(pairs, epochs)
    for epoch in range(epochs):
        assert sorted(drawn[epoch * pairs : (epoch + 1) * pairs]) == list(range(pairs))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and len(batches[-1]) >= 1


def test_the_order_is_a_pure_function_of_seed_and_step():
    np.random.seed(0)
    first = [batch_rows(step, 100, 8, 2, seed=5).tolist() for step in range(25)]
    np.random.seed(1)
    assert [batch_rows(step, 100, 8, 2, seed=5).tolist() for step in reversed(range(25))][::-1] == first
    assert batch_rows(0, 100, 8, 2, seed=6).tolist() != first[0]
    drawn = sum(first, [])
    assert len(drawn) == 200 and drawn[:100] != drawn[100:]  # each epoch has an order of its own


def test_drawn_rows_are_those_of_all_batches():
    batches = [batch_rows(step, 100, 8, 0.5, seed=5) for step in range(7)]
    assert drawn_rows(3, 100, 8, 0.5, seed=5).tolist() == sorted(np.concatenate(batches[:3]))
    assert drawn_rows(7, 100, 8, 0.5, seed=5).tolist() == sorted(np.concatenate(batches))
    assert drawn_rows(30, 100, 8, 2, seed=5).tolist() == list(range(100))


def test_fractional_epochs_end_in_the_middle():
    drawn = np.concatenate([batch_rows(step, 10, 4, 1.5, seed=0) for step in range(4)])
    assert len(drawn) == 15 and np.bincount(drawn).tolist().count(2) == 5


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 200))
def test_micro_batches_hold_every_pair_and_no_more_than_micro_tokens(lengths, micro_tokens):
    rows = np.random.default_rng(0).permutation(1000)[: len(lengths)]
    length_of = dict(zip(rows.tolist(), lengths, strict=True))
    parts = [part.tolist() for part in micro_batches(rows, np.array(lengths), micro_tokens)]
    assert sorted(sum(parts, [])) == sorted(rows.tolist())
    filled = [sum(length_of[row] for row in part) for part in parts]
    assert max(filled) <= micro_tokens
    assert len(parts) == 1 or sorted(filled)[0] + sorted(filled)[1] > micro_tokens  # no two would fit in one


def test_a_pair_longer_than_micro_tokens_gets_a_row_of_its_own():
    parts = [part.tolist() for part in micro_batches(np.array([5, 6, 7]), np.array([3, 90, 4]), 10)]
    assert parts == [[6], [7, 5]]


@settings(deadline=None)
@given(
    st.lists(st.integers(20, 700), min_size=200, max_size=400),
    st.integers(1, 128),
    st.sampled_from([1024, 4096, 16384]),
    st.sampled_from([1, 2, 8]),
)
def test_rows_of_one_length_are_long_enough_for_every_pair_and_within_micro_tokens(
    lengths, batch, micro, ranks
):
    length = padded_pass(np.array(lengths), batch, micro, ranks)
    assert max(lengths) <= length <= micro


def test_rows_of_one_length_are_filled_whatever_the_number_of_ranks():
    """64 pairs of about 350 tokens in rows of at most 16,384: padding is a third for one rank, 92 % for 16 otherwise."""
    tokens = np.random.default_rng(0).lognormal(5.7, 0.5, 5000).clip(50, 768).astype(int)
    for ranks in (1, 2, 4, 8, 16):
        length = padded_pass(tokens, 64, 16_384, ranks)
        batches = tokens[: 64 * 50].reshape(50, 64)
        laid_out = sum(len(micro_batches(b, b, length, 0, ranks)) * ranks * length for b in batches)
        assert batches.sum() / laid_out > (0.75 if ranks <= 8 else 0.6)
