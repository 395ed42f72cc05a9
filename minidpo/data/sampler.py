"""Which pairs a step draws, and how its batch is cut into packed rows."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace

import numpy as np

_Bins = list[list[int]]


@dataclass(frozen=True)
class PairOrder:
    """The batch of every optimizer step: a pure function of seed and step, so that a resumed run continues.

    Epoch after epoch of independent permutations follow one another in one stream, and step k (from 0)
    averages over the k-th `batch_size` of it. Only the run's last batch may be smaller. max_steps: 0 for as
    many as the epochs fill.
    """

    pairs: int
    batch_size: int
    epochs: float
    max_steps: int
    seed: int

    def __len__(self) -> int:
        """Optimizer steps of the run."""
        return -(-len(self._stream) // self.batch_size)

    def __getitem__(self, step: int) -> np.ndarray:
        """(B,) row numbers, in the order in which they are drawn."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self._stream[step * self.batch_size : (step + 1) * self.batch_size]

    def drawn(self) -> np.ndarray:
        """The row numbers that the whole run draws, each once: of a million pairs a short run draws few."""
        return np.unique(self._stream)

    def epoch(self, done: int) -> float:
        """Passes over the pairs after `done` steps."""
        return min(done * self.batch_size, len(self._stream)) / self.pairs

    @cached_property
    def _stream(self) -> np.ndarray:
        draws = max(1, round(self.pairs * self.epochs))
        if self.max_steps:
            draws = min(draws, self.max_steps * self.batch_size)
        epochs = range(-(-draws // self.pairs))
        orders = [np.random.default_rng([self.seed, epoch]).permutation(self.pairs) for epoch in epochs]
        return np.concatenate(orders)[:draws]


def micro_batches(
    rows: np.ndarray, tokens: np.ndarray, micro_tokens: int, rank: int = 0, ranks: int = 1
) -> list[np.ndarray]:
    """Cut a batch into few packed rows of at most `micro_tokens`. Returns those of `rank`, equally many for
    each rank.

    rows: pair numbers. tokens: how many tokens each of them lays out. A pair longer than micro_tokens gets a
    row of its own (a run refuses such a setting at the start). With more ranks than pairs, some micro-batches
    are empty: all ranks gather sharded parameters together, so each must make as many passes.
    """
    longest_first = np.argsort(-tokens, kind="stable").tolist()
    sizes = tokens.tolist()
    bins = _best_fit(longest_first, sizes, micro_tokens)
    if ranks > 1:
        # No rank should wait for another: the same number of bins per rank, filled as evenly as possible.
        count = -(-max(len(bins), 1) // ranks) * ranks
        while (level := _leveled(longest_first, sizes, micro_tokens, count)) is None:
            count += ranks
        bins = level[rank::ranks]
    return [rows[members] for members in bins]


def _best_fit(longest_first: list[int], sizes: list[int], micro_tokens: int) -> _Bins:
    """Few bins: each pair goes into the bin with the least room that it fits."""
    bins: _Bins = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for i in longest_first:
        tightest = bisect_left(room, (sizes[i], 0))
        if tightest < len(room):
            free, fits = room.pop(tightest)
        else:
            free, fits = micro_tokens, len(bins)
            bins.append([])
        bins[fits].append(i)
        insort(room, (free - sizes[i], fits))
    return bins


def _leveled(longest_first: list[int], sizes: list[int], micro_tokens: int, count: int) -> _Bins | None:
    """`count` bins of like size: each pair goes into the emptiest bin. Returns None if a bin with several
    pairs would exceed micro_tokens."""
    bins: _Bins = [[] for _ in range(count)]
    filled = [(0, b) for b in range(count)]  # (tokens, bin), a heap
    for i in longest_first:
        total, emptiest = filled[0]
        if total and total + sizes[i] > micro_tokens:
            return None
        bins[emptiest].append(i)
        heapreplace(filled, (total + sizes[i], emptiest))
    return bins
