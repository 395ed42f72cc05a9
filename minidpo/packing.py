"""Token pairs to packed rows, and the order in which pairs are drawn.

A packed row holds several pairs without padding, each laid out once as [prompt | chosen | rejected]:

    tokens      p p p p c c c r r | p p c c c c r r r | ...
    positions   0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 5 2 3 4 | ...     rejected restarts where the prompt ended

The last prompt token predicts the first token of both endings. `queries` names the rows whose final hidden
states are wanted; the rest of the row never reaches the last layer's MLP or the vocabulary.
Dimensions: B pairs, N tokens of a row, S selected rows, E = endings a pair (1 or 2).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.attention import (
    Segment,
    TokenPlaces,
    masked_attention,
    segment_attention,
    shared_prompt_mask,
)
from minidpo.token_store import PairTokens


@dataclass(frozen=True)
class Wanted:
    """What a loss needs of a pair; what is not wanted is not laid out or not computed."""

    chosen_logps: bool = False
    rejected_logps: bool = False
    rewards: bool = False  # the hidden state of both endings' last tokens

    @property
    def rejected(self) -> bool:
        return self.rejected_logps or self.rewards


@dataclass(frozen=True)
class PackedRow:
    tokens: Tensor  # (N,) int64
    places: TokenPlaces  # (N,) each
    queries: Tensor  # (S,) rows of the wanted hidden states, by pair, then by ending
    scored: Tensor  # (scored,) which of the S predict a scored token
    targets: Tensor  # (scored,) the token each of them predicts
    scored_lengths: Tensor  # (scored endings,) tokens of each scored ending, EOS included
    last: Tensor  # (B, 2) which of the S is the last token of chosen and rejected; (B, 0) unless wanted
    segments: list[Segment]  # attention of all rows
    query_segments: list[Segment]  # attention of the queries alone, for the last layer
    pairs: int
    endings: int  # scored ones of each pair

    def to(self, device: torch.device) -> "PackedRow":
        if device.type == "cpu":
            return self
        names = ("tokens", "queries", "scored", "targets", "scored_lengths", "last")
        moved: dict[str, Any] = {name: _moved(getattr(self, name), device) for name in names}
        return replace(self, places=TokenPlaces(*(_moved(place, device) for place in self.places)), **moved)

    def attends(self, layers: int) -> list:
        """One attention function a layer: every row for all but the last, which answers for the queries."""
        if self.tokens.device.type == "cuda":
            every = masked_attention(shared_prompt_mask(self.places, self.places))
            wanted = masked_attention(shared_prompt_mask(self.places.at(self.queries), self.places))
        else:
            every, wanted = segment_attention(self.segments), segment_attention(self.query_segments)
        return [every] * (layers - 1) + [wanted]


def pack_row(pairs: PairTokens, wanted: Wanted, pad_to: int = 0) -> PackedRow:
    """Lay `pairs` out as one row.

    With `pad_to` the row has that fixed length and its queries one of about eight (for CUDA, where a new shape means a
    new compilation): every padding token is a pair of its own that nothing else can see.
    """
    tokens, pair_of, ending_of, position = [], [], [], []
    queries, scored, targets, scored_lengths, last = [], [], [], [], []
    segments, query_segments = [], []
    n = s = 0
    for b, (start, prompt_end, chosen_end, rejected_end) in enumerate(pairs.bounds):
        prompt_length = int(prompt_end - start)
        prompt = slice(n, n + prompt_length)
        laid_out_end = rejected_end if wanted.rejected else chosen_end
        tokens.append(pairs.ids[start:laid_out_end])
        pair_of.append(np.full(laid_out_end - start, b))
        ending_of.append(np.zeros(prompt_length, int))
        position.append(np.arange(prompt_length))
        segments.append(Segment(prompt, (prompt,)))
        n += prompt_length
        endings = [(prompt_end, chosen_end, wanted.chosen_logps)]
        if wanted.rejected:
            endings.append((chosen_end, rejected_end, wanted.rejected_logps))
        for which, (begin, end, is_scored) in enumerate(endings, start=1):
            length = int(end - begin)
            ending_of.append(np.full(length, which))
            position.append(np.arange(prompt_length, prompt_length + length))
            segments.append(Segment(slice(n, n + length), (prompt, slice(n, n + length))))
            # Rows that predict this ending's tokens (last prompt token, then all but its last), then its last.
            rows = np.r_[prompt.stop - 1, n : n + length]
            rows = rows[(0 if is_scored else length) : length + wanted.rewards]
            if len(rows):
                queries.append(rows)
                seen = slice(n, n + length - (not wanted.rewards))
                keys = (prompt, seen) if seen.stop > n else (prompt,)
                query_segments.append(Segment(slice(s, s + len(rows)), keys))
            if is_scored:
                scored.append(np.arange(s, s + length))
                targets.append(pairs.ids[begin:end])
                scored_lengths.append(length)
            s += len(rows)
            if wanted.rewards:
                last.append(s - 1)
            n += length
    if pad_to:
        padding = pad_to - n
        if padding < 0:
            raise ValueError(f"pad_to is {pad_to}, but the pairs take {n} tokens")
        tokens.append(np.zeros(padding, int))
        pair_of.append(np.arange(len(pairs), len(pairs) + padding))
        ending_of.append(np.zeros(padding, int))
        position.append(np.zeros(padding, int))
        steps = max(128, pad_to // 8)  # a few query lengths, not one for every row
        # At least one step of them: FlexAttention's CUDA kernel takes no empty query, a rank may get no pair.
        queries.append(np.zeros(-s % steps if s else steps, int))
    return PackedRow(
        tokens=_tensor(tokens),
        places=TokenPlaces(_tensor(pair_of), _tensor(ending_of), _tensor(position)),
        queries=_tensor(queries),
        scored=_tensor(scored),
        targets=_tensor(targets),
        scored_lengths=torch.tensor(scored_lengths, dtype=torch.int64),
        last=torch.tensor(last, dtype=torch.int64).view(len(pairs), 2 * wanted.rewards),
        segments=segments,
        query_segments=query_segments,
        pairs=len(pairs),
        endings=wanted.chosen_logps + wanted.rejected_logps,
    )


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """Without waiting: a copy from memory that is not pinned would stand in line behind the pass before."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def _tensor(parts: list[np.ndarray]) -> Tensor:
    return (
        torch.from_numpy(np.concatenate(parts).astype(np.int64))
        if parts
        else torch.zeros(0, dtype=torch.int64)
    )


def batch_rows(step: int, pairs: int, batch_size: int, epochs: float, seed: int) -> np.ndarray:
    """Which pairs optimizer step `step` (from 0) averages over: a pure function, so that a resumed run continues.

    Epoch after epoch of independent permutations follow one another in one stream, and step k takes the k-th
    `batch_size` of it. Only the run's last batch may be smaller. Returns row numbers, in drawing order.
    """
    begin = step * batch_size
    end = min(begin + batch_size, total_draws(pairs, epochs))
    drawn = []
    for epoch in range(begin // pairs, (end - 1) // pairs + 1):
        order = np.random.default_rng([seed, epoch]).permutation(pairs)
        drawn.append(order[max(begin - epoch * pairs, 0) : end - epoch * pairs])
    return np.concatenate(drawn)


def drawn_rows(steps: int, pairs: int, batch_size: int, epochs: float, seed: int) -> np.ndarray:
    """The pairs that the first `steps` batches hold, each once, in order: of a million pairs a short run needs few."""
    return np.unique(batch_rows(0, pairs, steps * batch_size, epochs, seed))


def total_steps(pairs: int, batch_size: int, epochs: float, max_steps: int = 0) -> int:
    """Optimizer steps of a run: as many as the epochs fill, at most `max_steps` if that is set."""
    steps = -(-total_draws(pairs, epochs) // batch_size)
    return min(steps, max_steps) if max_steps else steps


def total_draws(pairs: int, epochs: float) -> int:
    return max(1, round(pairs * epochs))


def padded_pass(tokens: np.ndarray, batch_size: int, micro_tokens: int, ranks: int = 1) -> int:
    """How long rows should be where each is padded to one length: at most micro_tokens, at least the longest pair.

    As few passes as micro_tokens allows, each of them full: of a batch of 22,000 tokens two rows of 16,384 would be a
    third padding. tokens: of each pair. Most batches (mean and two standard deviations) are meant to fit.
    """
    batch = batch_size * tokens.mean() + 2 * batch_size**0.5 * tokens.std()
    passes = np.ceil(batch / (ranks * micro_tokens))
    even = batch / (ranks * passes) + tokens.mean()  # pairs are whole: a row is seldom filled to its end
    return min(micro_tokens, max(int(tokens.max()), int(-(-even // 128) * 128)))


def micro_batches(
    rows: np.ndarray, tokens: np.ndarray, micro_tokens: int, rank: int = 0, ranks: int = 1
) -> list[np.ndarray]:
    """Cut a batch into few packed rows of at most `micro_tokens`; those of rank `rank`, as many for each of `ranks`.

    rows: pair numbers; tokens: how many tokens each of them lays out. A pair longer than micro_tokens gets a row
    of its own (the scripts refuse such a setting at the start). Where there are more ranks than pairs some micro-batches
    are empty: sharded parameters are gathered by all ranks together, so each must make as many passes.
    """
    bins = _best_fit(tokens, micro_tokens)
    if ranks > 1:
        count = -(-max(len(bins), 1) // ranks) * ranks
        while (level := _leveled(tokens, micro_tokens, count)) is None:
            count += ranks
        bins = level[rank::ranks]
    return [rows[members] for members in bins]


def _best_fit(tokens: np.ndarray, micro_tokens: int) -> list[list[int]]:
    """The longest first, each where it fits tightest: few bins."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), the tightest first
    for i in np.argsort(-tokens, kind="stable").tolist():
        tightest = bisect_left(room, (int(tokens[i]), 0))
        free, fits = room.pop(tightest) if tightest < len(room) else (micro_tokens, len(bins))
        if fits == len(bins):
            bins.append([])
        bins[fits].append(i)
        insort(room, (free - int(tokens[i]), fits))
    return bins


def _leveled(tokens: np.ndarray, micro_tokens: int, count: int) -> list[list[int]] | None:
    """The longest first, each where there is most room: `count` bins of like size, so that no rank waits for another.

    None where a bin would hold more than micro_tokens and a pair with company.
    """
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, b) for b in range(count)]
    for i in np.argsort(-tokens, kind="stable").tolist():
        total, least = heappop(filled)
        if bins[least] and total + int(tokens[i]) > micro_tokens:
            return None
        bins[least].append(i)
        heappush(filled, (total + int(tokens[i]), least))
    return bins
