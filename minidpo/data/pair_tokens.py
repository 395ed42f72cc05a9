"""Token ids of prompts and their responses: a million pairs are a few flat arrays, not millions of lists."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from minidpo.files import fingerprint


class TokenPair(NamedTuple):
    """Ids of one prompt and its two responses, each to its end unless cut. See also PreferencePair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs of a pair
    margin: float | None = None
    file: int = 0
    templated: bool = False  # whether a chat template wrote the prompt


@dataclass(eq=False)
class PairTokens:
    """n prompts with K responses each. Of preference pairs K is 2: chosen, rejected."""

    ids: np.ndarray  # int32; of each prompt: its tokens, those of response 1, ..., those of response K
    bounds: np.ndarray  # (n, 2 + K) int64: where in ids each prompt starts and ends, its responses end
    index: np.ndarray  # (n,) int64: the record's number in its file, for messages
    margin: np.ndarray | None = None  # (n,) float64, NaN for a record without one; None if no record has one
    file: np.ndarray | None = None  # (n,) int64: which of `files` the record is from
    key: np.ndarray | None = None  # (n, 16) uint8: a digest of the prompt as the record has it
    templated: np.ndarray | None = None  # (n,) bool: whether a chat template wrote the prompt
    files: tuple[str, ...] = ()
    date: str = ""  # the one that the chat template wrote into the texts; empty: none
    ref_logps: np.ndarray | None = None  # (n, 2) float32, nats: the frozen reference's, once computed

    @classmethod
    def from_pairs(cls, pairs: Iterable[TokenPair], files: tuple[str, ...] = ()) -> Self:
        index, margin, file, templated = array("q"), array("d"), array("q"), array("b")

        def texts() -> Iterator[Sequence[list[int]]]:
            for pair in pairs:
                index.append(pair.index)
                margin.append(float("nan") if pair.margin is None else pair.margin)
                file.append(pair.file)
                templated.append(pair.templated)
                yield pair[:3]

        ids, bounds = _flatten(texts(), 2)
        margins = None if np.isnan(margin).all() else np.asarray(margin)
        of_file = np.asarray(file) if files else None
        written = np.asarray(templated, bool)
        return cls(ids, bounds, np.asarray(index), margins, of_file, templated=written, files=files)

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
    def lengths(self) -> np.ndarray:
        """(n, 1 + K): tokens of each prompt and of its responses."""
        return np.diff(self.bounds, axis=1)

    @property
    def on_messages(self) -> bool:
        """Whether a chat template wrote the prompt of any pair."""
        return self.templated is not None and bool(self.templated.any())

    def token_counts(self, responses: int | None = None) -> np.ndarray:
        """(n,): tokens that each prompt lays out with its first `responses` (default: all of them)."""
        last = -1 if responses is None else 1 + responses
        return self.bounds[:, last] - self.bounds[:, 0]

    def select(self, indices: np.ndarray) -> Self:
        """The pairs at `indices` (numbers, or a mask), over the same token array."""
        return replace(self, **{name: values[indices] for name, values in self.columns().items()})

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays there are with one entry per pair, by name."""
        arrays = {name: values for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        return {name: values for name, values in arrays.items() if name != "ids"}

    def margins(self, indices: np.ndarray) -> Tensor | None:
        """(B,) float32: by how much chosen is better in the pairs at `indices`; None if no record says so."""
        return None if self.margin is None else torch.from_numpy(self.margin[indices]).float()

    def records(self, indices: np.ndarray) -> str:
        """Where the pairs at `indices` are from: "records [3, 7] of a.jsonl, records [0] of b.jsonl"."""
        if self.file is None:
            return f"records {self.index[indices].tolist()}"
        return ", ".join(
            f"records {self.index[indices][self.file[indices] == file].tolist()} of {self.files[file]}"
            for file in np.unique(self.file[indices])
        )

    def prompt_keys(self) -> list[bytes]:
        """A key per prompt: equal for prompts that are equal in their records, whatever became of them."""
        if self.key is not None:
            return [key.tobytes() for key in self.key]
        return self.token_keys()

    def token_keys(self) -> list[bytes]:
        """A digest of each prompt's token ids: equal for prompts that are equal to the model."""
        prompts = self.bounds[:, :2]
        return [hashlib.blake2b(self.ids[start:end].data, digest_size=16).digest() for start, end in prompts]

    def fingerprint(self) -> str:
        """Of token ids, lengths and margins: whatever changes them (files, tokenizer, limits, split) does."""
        digest = hashlib.blake2b(digest_size=16)
        for start, *_, end in self.bounds:  # One by one, because all at once would be a copy of the data.
            digest.update(self.ids[start:end].data)
        margin = b"" if self.margin is None else self.margin.tobytes()
        return fingerprint(digest.digest(), self.lengths.tobytes(), margin)


def _flatten(texts: Iterable[Sequence[list[int]]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and bounds of texts, each of which is a prompt and its `k` responses."""
    ids, bounds = array("i"), array("q")
    for text in texts:
        bounds.append(len(ids))
        for part in text:
            ids.extend(part)
            bounds.append(len(ids))
    return np.asarray(ids), np.asarray(bounds).reshape(-1, 2 + k)
