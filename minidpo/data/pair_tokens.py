"""Token ids of prompts and their responses: a million pairs are a few flat arrays, not millions of lists."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import nan
from typing import NamedTuple, Self

import numpy as np

from minidpo.errors import UserError
from minidpo.files import fingerprint

Ranges = tuple[tuple[int, int], ...]  # rising, of tokens or characters: from the first, up to the second


class TokenPair(NamedTuple):
    """Ids of one prompt and its responses, each to its end unless cut. See also PreferencePair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] | None  # None: the record has one response
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs of a pair
    margin: float | None = None
    file: int = 0
    templated: bool = False  # whether a chat template wrote the prompt
    label: bool | None = None  # of a single response: whether it is desirable
    unscored: tuple[Ranges, ...] = ()  # per response: its tokens that others wrote; empty: all are scored

    @property
    def responses(self) -> list[list[int]]:
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]

    @property
    def kind(self) -> str:
        """What all records of a data set have alike."""
        if self.rejected is not None:
            return "two responses"
        return "one response" if self.label is None else "one response with a label"

    def unscored_ranges(self) -> Iterator[tuple[int, int]]:
        """Those of `unscored`, counted from the first token of the prompt, with the responses after it."""
        start = len(self.prompt)
        for response, ranges in zip(self.responses, self.unscored, strict=False):
            yield from ((start + begin, start + end) for begin, end in ranges)
            start += len(response)


@dataclass(eq=False)
class PairTokens:
    """n prompts with K responses each. Of preference pairs K is 2: chosen, rejected."""

    ids: np.ndarray  # int32; of each prompt: its tokens, those of response 1, ..., those of response K
    bounds: np.ndarray  # (n, 2 + K) int64: where in ids each prompt starts and ends, its responses end
    index: np.ndarray  # (n,) int64: the record's number in its file, for messages
    margin: np.ndarray | None = None  # (n,) float64, NaN for a record without one; None if no record has one
    label: np.ndarray | None = None  # (n,) bool: whether a single response is desirable; None: no labels
    file: np.ndarray | None = None  # (n,) int64: which of `files` the record is from
    key: np.ndarray | None = None  # (n, 16) uint8: a digest of the prompt as the record has it
    templated: np.ndarray | None = None  # (n,) bool: whether a chat template wrote the prompt
    files: tuple[str, ...] = ()
    date: str = ""  # the one that the chat template wrote into the texts; empty: none
    ref_logps: np.ndarray | None = None  # (n, K) float32, nats: the frozen reference's, once computed
    unscored: np.ndarray | None = None  # (len(ids),) bool: tokens of responses that others wrote; None: none

    @classmethod
    def from_pairs(cls, pairs: Iterable[TokenPair], files: tuple[str, ...] = ()) -> Self:
        """Raises `UserError` unless all have equally many responses, and either all a label or none."""
        pairs = iter(pairs)
        first = next(pairs, None)
        every, kind = (chain([first], pairs), first.kind) if first else (pairs, "")
        source, margin = array("q"), array("d")  # source: four values per pair
        borders = array("q", [0])  # in ids: tokens that are scored and that others wrote take turns

        def texts() -> Iterator[Sequence[list[int]]]:
            start = 0
            for pair in every:
                if pair.kind != kind:
                    of_file = f" of {files[pair.file]}" if files else ""
                    what = f"record {pair.index}{of_file} has {pair.kind}, and those before it {kind}"
                    raise UserError(f"{what}; a data set keeps to one")
                borders.extend(start + border for each in pair.unscored_ranges() for border in each)
                start += len(pair.prompt) + sum(map(len, pair.responses))
                source.extend((pair.index, pair.file, pair.templated, bool(pair.label)))
                margin.append(nan if pair.margin is None else pair.margin)
                yield pair.prompt, *pair.responses

        ids, bounds = _flatten(texts(), len(first.responses) if first else 2)
        lengths = np.diff(borders, append=len(ids))
        index, file, templated, label = np.ascontiguousarray(np.reshape(source, (-1, 4)).T)
        return cls(
            ids,
            bounds,
            index,
            margin=None if np.isnan(margin).all() else np.asarray(margin),
            label=label.astype(bool) if first and first.label is not None else None,
            file=file if files else None,
            templated=templated.astype(bool),
            files=files,
            unscored=np.resize([False, True], len(lengths)).repeat(lengths) if len(lengths) > 1 else None,
        )

    @classmethod
    def from_responses(cls, prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]]) -> Self:
        """Each prompt with its own responses. Raises ValueError unless they are equally many for all."""
        k = len(responses[0]) if responses else 1
        if any(len(its) != k for its in responses):
            raise ValueError(f"the first prompt has {k} responses; give each prompt as many")
        texts = ((prompt, *its) for prompt, its in zip(prompts, responses, strict=True))
        return cls(*_flatten(texts, k), np.arange(len(prompts)))

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def responses(self) -> int:
        """K, the number of responses of each prompt."""
        return self.bounds.shape[1] - 2

    @property
    def lengths(self) -> np.ndarray:
        """(n, 1 + K): tokens of each prompt and of its responses."""
        return np.diff(self.bounds, axis=1)

    @property
    def scored_lengths(self) -> np.ndarray:
        """(n, K): scored tokens of each response."""
        lengths = self.lengths[:, 1:]
        return lengths if self.unscored is None else lengths - count_marked(self.unscored, self.bounds)

    @property
    def on_messages(self) -> bool:
        """Whether a chat template wrote the prompt of any pair."""
        return self.templated is not None and bool(self.templated.any())

    def token_counts(self, responses: int | None = None) -> np.ndarray:
        """(n,): tokens that each prompt lays out with its first `responses` (default: all of them)."""
        last = -1 if responses is None else 1 + responses
        return self.bounds[:, last] - self.bounds[:, 0]

    def pair(self, row: int) -> TokenPair:
        start, *ends = self.bounds[row].tolist()
        texts = [self.ids[a:b].tolist() for a, b in zip([start, *ends], ends, strict=False)]
        prompt, chosen, rejected = [*texts, None][:3]
        unscored: list[Ranges] = []
        if self.unscored is not None:
            for begin, end in zip(ends, ends[1:], strict=False):
                borders = np.flatnonzero(np.diff(self.unscored[begin:end], prepend=False, append=False))
                unscored.append(tuple((first, last) for first, last in borders.reshape(-1, 2).tolist()))
        return TokenPair(
            prompt,
            chosen,
            rejected,
            int(self.index[row]),
            margin=None if self.margin is None or np.isnan(self.margin[row]) else float(self.margin[row]),
            file=0 if self.file is None else int(self.file[row]),
            label=None if self.label is None else bool(self.label[row]),
            unscored=tuple(unscored),
        )

    def select(self, indices: np.ndarray) -> Self:
        """The pairs at `indices` (numbers, or a mask), over the same token array."""
        return replace(self, **{name: values[indices] for name, values in self.columns().items()})

    def unpaired(self) -> Self:
        """2n records of one labelled response: the chosen ones, which are desirable, then the rejected."""
        rows = np.tile(np.arange(len(self)), 2)
        single = self.with_responses(rows, rows, np.repeat([0, 1], len(self)))
        return replace(single, label=np.repeat([True, False], len(self)))

    def mismatched(self, batches: Iterable[np.ndarray], max_length: int) -> Self:
        """Of every batch of rows: each prompt with the first response of the row before it (the first one
        with that of the last), cut where its text would exceed max_length tokens."""
        batches = list(batches)
        before = np.concatenate([np.roll(batch, 1) for batch in batches])
        return self.with_responses(np.concatenate(batches), before, np.zeros_like(before), max_length)

    def with_responses(
        self, rows: np.ndarray, others: np.ndarray, which: np.ndarray, max_length: int | None = None
    ) -> Self:
        """K = 1: the prompts of `rows` (numbers, (m,)) with response `which`, from 0, of rows `others`."""
        prompts = self.bounds[rows, :2]
        responses = np.stack([self.bounds[others, 1 + which], self.bounds[others, 2 + which]], axis=1)
        if max_length is not None:
            room = max_length - (prompts[:, 1] - prompts[:, 0])
            responses[:, 1] = np.minimum(responses[:, 1], responses[:, 0] + room)
        parts = np.stack([prompts, responses], axis=1).reshape(-1, 2)  # each where it starts and ends in ids
        ends = (parts[:, 1] - parts[:, 0]).cumsum().reshape(-1, 2)  # of each prompt, and of its response
        bounds = np.column_stack([np.r_[0, ends[:-1, 1]][: len(ends)], ends])
        where = np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in parts.tolist())])
        unscored = None if self.unscored is None else self.unscored[where]
        few = self.select(rows)
        return replace(few, ids=self.ids[where], bounds=bounds, unscored=unscored, ref_logps=None)

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays there are with one entry per pair, by name."""
        arrays = {name: values for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return {name: values for name, values in arrays.items() if name not in ("ids", "unscored")}

    def records(self, indices: np.ndarray) -> str:
        """Where the pairs at `indices` are from: "records [3, 7] of a.jsonl, records [0] of b.jsonl"."""
        index = self.index[indices]
        if self.file is None:
            return f"records {index.tolist()}"
        file = self.file[indices]
        each = (f"records {index[file == i].tolist()} of {self.files[i]}" for i in np.unique(file))
        return ", ".join(each)

    def token_keys(self) -> list[bytes]:
        """A digest of each prompt's token ids: equal for prompts that are equal to the model."""
        prompts = self.bounds[:, :2]
        return [hashlib.blake2b(self.ids[start:end].data, digest_size=16).digest() for start, end in prompts]

    def fingerprint(self) -> str:
        """Of token ids, which of them are scored, lengths, margins and labels."""
        digest = hashlib.blake2b(digest_size=16)
        for start, *_, end in self.bounds:  # One by one, because all at once would be a copy of the data.
            digest.update(self.ids[start:end].data)
            if self.unscored is not None:
                digest.update(self.unscored[start:end].data)
        margin = b"" if self.margin is None else self.margin.tobytes()
        label = () if self.label is None else (self.label.tobytes(),)
        return fingerprint(digest.digest(), self.lengths.tobytes(), margin, *label)


def count_marked(marks: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """How many of the marked tokens lie in each response, (P, K). marks (N,) bool; bounds (P, K + 2)."""
    before = np.r_[0, np.cumsum(marks)]  # (N + 1,) marked tokens before each one
    return np.diff(before[bounds[:, 1:]], axis=1)


def _flatten(texts: Iterable[Sequence[list[int]]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and bounds of texts, each of which is a prompt and its `k` responses."""
    ids, bounds = array("i"), array("q")
    for text in texts:
        bounds.append(len(ids))
        for part in text:
            ids.extend(part)
            bounds.append(len(ids))
    return np.asarray(ids), np.asarray(bounds).reshape(-1, 2 + k)
