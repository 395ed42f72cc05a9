"""The account every run opens with: what was read, what was kept, what was left out and where it stood."""

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_FIRST_FEW = 5


@dataclass
class FileReport:
    """What one file held: `read` counts records, `dropped` maps a reason to line numbers from 1."""

    path: str
    format: str = ""
    read: int = 0
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    @property
    def kept(self) -> int:
        return self.read - sum(map(len, self.dropped.values()))


@dataclass
class DataReport:
    """What became of the records: one `FileReport` a file, then what the tokenizing stage adds.

    `tokenized` counts the pairs that stage was given; `lengths` holds theirs in tokens, EOS included, before
    any cut; `dropped` maps a reason to (file, record): a place in `files` and one in that file, from 0. The
    other counts are of the kept pairs, as they go to the model. `limits` are max_length and max_prompt_length, which
    cut them. `truncated_endings` counts endings, of which a pair has two; `prompts` has one hash a pair.
    """

    files: list[FileReport] = field(default_factory=list)
    tokenized: int = 0
    dropped: dict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    limits: tuple[int, int] = (0, 0)
    truncated_prompts: int = 0
    truncated_endings: int = 0
    prompt_tokens: int = 0
    ending_tokens: int = 0
    lengths: dict[str, array] = field(
        default_factory=lambda: {part: array("I") for part in ("prompt", "chosen", "rejected")}
    )
    prompts: array = field(default_factory=lambda: array("q"))

    @property
    def kept(self) -> int:
        return self.tokenized - sum(map(len, self.dropped.values()))

    def lines(self) -> Iterator[str]:
        """The report as printable lines."""
        for file in self.files:
            yield f"{file.path}: {file.format}: {file.read} records read, {file.kept} kept"
            yield from ("  " + line for line in dropped_lines(file.dropped, "line"))
        if not self.tokenized:
            return
        different = len(np.unique(self.prompts))
        yield f"tokenized {self.tokenized} pairs, {self.kept} kept, with {different} different prompts"
        yield from ("  " + line for line in self.dropped_lines())
        limits = "max_length {}, max_prompt_length {}".format(*self.limits)
        yield f"  truncated {self.truncated_prompts} prompts and {self.truncated_endings} endings ({limits})"
        for part, lengths in self.lengths.items():
            p5, p50, p95, longest = (round(p) for p in np.percentile(lengths, (5, 50, 95, 100)))
            yield f"  {part} tokens before any cut: median {p50}, 5th to 95th percentile {p5} to {p95}, longest {longest}"
        if total := self.prompt_tokens + self.ending_tokens:
            yield f"  endings are {self.ending_tokens / total:.0%} of the {total} tokens kept"

    def dropped_lines(self) -> Iterator[str]:
        """Of the tokenizing stage; with several files a record is named with the file it stands in."""

        def name(place: tuple[int, int]) -> str:
            file, record = place
            return f"{Path(self.files[file].path).name}:{record}" if len(self.files) > 1 else str(record)

        return dropped_lines(self.dropped, "record", name)


def dropped_lines(
    dropped: Mapping[str, Sequence], unit: str, name: Callable[[Any], str] = str
) -> Iterator[str]:
    """One line a reason: how many were dropped, and the first few of their places, called `unit`."""
    for reason, places in dropped.items():
        first = ", ".join(map(name, places[:_FIRST_FEW])) + (", ..." if len(places) > _FIRST_FEW else "")
        yield f"dropped {len(places)}: {reason} ({unit} {first})"
