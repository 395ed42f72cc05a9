"""Which pairs a step draws, and how its batch is cut into micro-batches."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from heapq import heapreplace

import numpy as np


@dataclass(frozen=True)
class PairOrder:
    """The batch of every optimizer step. It follows from these fields and the step, so a run can be resumed.

    Every epoch is a new permutation of the pairs. The epochs form one sequence, which is cut into batches, so
    only the last batch of the run may be smaller. max_steps: 0 means no limit.
    """

    pairs: int
    batch_size: int
    epochs: float
    max_steps: int
    seed: int

    def __len__(self) -> int:
        """The number of optimizer steps of the run."""
        return -(-len(self._stream) // self.batch_size)

    def __getitem__(self, step: int) -> np.ndarray:
        """The numbers of the pairs of a step, (B,)."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self._stream[step * self.batch_size : (step + 1) * self.batch_size]

    def drawn(self) -> np.ndarray:
        """The numbers of all pairs that the run draws, each once. A short run does not draw all pairs."""
        return np.unique(self._stream)

    def epoch(self, done: int) -> float:
        """How many epochs are finished after `done` steps."""
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
    indices: np.ndarray, token_counts: np.ndarray, micro_tokens: int, rank: int = 0, ranks: int = 1
) -> list[np.ndarray]:
    """Cut a batch into few micro-batches of at most `micro_tokens` tokens. Returns those of `rank`.

    indices: the numbers of the pairs; token_counts: the tokens of each in a packed row. A pair with more than
    micro_tokens gets a micro-batch of its own. All ranks gather sharded parameters together, so all get the
    same number of micro-batches, and some may be empty.
    """
    longest_first = np.argsort(-token_counts, kind="stable").tolist()
    sizes = token_counts.tolist()
    bins = _best_fit(longest_first, sizes, micro_tokens)
    if ranks > 1:
        # No rank should wait for another: the same number of bins per rank, filled as evenly as possible.
        count = -(-max(len(bins), 1) // ranks) * ranks
        while (level := _leveled(longest_first, sizes, micro_tokens, count)) is None:
            count += ranks
        bins = level[rank::ranks]
    return [indices[members] for members in bins]


def _best_fit(longest_first: list[int], sizes: list[int], micro_tokens: int) -> list[list[int]]:
    """Few bins: each pair goes into the fullest bin that still has room for it."""
    bins: list[list[int]] = []
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


def _leveled(
    longest_first: list[int], sizes: list[int], micro_tokens: int, count: int
) -> list[list[int]] | None:
    """`count` bins of similar size: each pair goes into the emptiest bin. Returns None if a bin with several
    pairs would exceed micro_tokens."""
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, b) for b in range(count)]  # (tokens, bin), a heap
    for i in longest_first:
        total, emptiest = filled[0]
        if total and total + sizes[i] > micro_tokens:
            return None
        bins[emptiest].append(i)
        heapreplace(filled, (total + sizes[i], emptiest))
    return bins
