"""The report with which every run begins: what was read, kept and dropped, and on which lines it stood."""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minidpo.data.bad_record import printable
from minidpo.data.pair_tokens import TokenPair

PARTS = ("prompt", "chosen", "rejected")
_FIRST_FEW = 5


@dataclass
class FileReport:
    """What one file held."""

    path: str
    format: str = ""
    read: int = 0  # records
    kept: int = 0  # of them, those that gave a pair
    pairs: int = 0  # those of the records that were kept
    columns: dict[str, str] = field(default_factory=dict)  # what was read under a key of another name
    margins: int = 0  # pairs that have one
    unit: str = "line"  # what the numbers in `dropped` count; "record" for a list, whose lines nobody counts
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # reason -> numbers
    unread: set[str] = field(default_factory=set)  # keys of records that hold something
    left_out: Counter[str] = field(default_factory=Counter)  # ends of generation prompts: of how many prompts
    noted: set[str] = field(default_factory=set)  # keys of its pairs' records that hold something

    def lines(self) -> Iterator[str]:
        several = f" as {self.pairs} pairs" if self.pairs != self.kept else ""
        yield f"{self.path}: {self.format}: {self.read} records read, {self.kept} kept{several}"
        if self.columns:
            columns = ", ".join(f"{name} = {printable(key)}" for name, key in self.columns.items())
            yield f"  read as: {columns}"
        if self.margins:
            yield f"  {self.margins} pairs with a margin, for loss.margin_from_data and data.min_margin"
        yield from ("  " + line for line in dropped_lines(self.dropped, self.unit))
        if self.unread:
            yield f"  keys that are not read: {', '.join(map(printable, sorted(self.unread)))}"
        for end, count in self.left_out.items():
            what = f"{count} prompts stop before {end!r}"
            yield f"  warning: {what}, because the chat template begins a response that is given without it"


@dataclass
class DataReport:
    """What became of the records: one `FileReport` per file, then what the tokenizing stage adds."""

    files: list[FileReport] = field(default_factory=list)
    # Of every record whose prompt could be read, dropped or not: its place, rising, and its prompt's digest.
    places: array = field(default_factory=lambda: array("q"))
    keys: bytearray = field(default_factory=bytearray)  # 16 bytes each
    kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason -> FILE:RECORD
    limits: tuple[int, int] = (0, 0)  # max_length, max_prompt_length
    # Of each part of every pair, uncut.
    lengths: dict[str, array] = field(default_factory=lambda: defaultdict(lambda: array("I")))
    own_bos: int = 0  # prompts whose text begins with BOS
    # Of the kept pairs, as they go to the model:
    truncated_prompts: int = 0
    truncated_messages: int = 0  # of these prompts, those that a chat template wrote
    truncated_responses: int = 0
    unscored_tokens: int = 0  # those of responses that others wrote

    def add_prompt(self, prompt: str, index: int, file: int) -> None:
        """Note the prompt of a record as it has it, once for all its pairs."""
        place = file << 40 | index
        if self.places and self.places[-1] == place:
            return
        self.places.append(place)
        self.keys.extend(hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=16).digest())

    def add(self, whole: TokenPair, pair: TokenPair, reason: str) -> None:
        """Count one pair before and after the cut. reason: why it is dropped; empty if it is kept."""
        for part, ids in zip(PARTS, (whole.prompt, *whole.responses), strict=False):
            self.lengths[part].append(len(ids))
        if reason:
            file = Path(self.files[pair.file].path).name + ":" if self.files else ""
            self.dropped[reason].append(f"{file}{pair.index}")
            return
        self.kept += 1
        is_cut = len(pair.prompt) < len(whole.prompt)
        self.truncated_prompts += is_cut
        self.truncated_messages += is_cut and pair.templated
        both = zip(pair.responses, whole.responses, strict=True)
        self.truncated_responses += sum(len(left) < len(before) for left, before in both)
        self.unscored_tokens += sum(end - begin for begin, end in pair.unscored_ranges())

    def lines(self) -> Iterator[str]:
        for file in self.files:
            yield from file.lines()
        if not self.lengths:
            return
        single = "rejected" not in self.lengths
        what = "responses" if single else "pairs"
        yield f"tokenized {len(self.lengths['prompt'])} {what}, {self.kept} kept"
        yield from ("  " + line for line in dropped_lines(self.dropped, "record"))
        if self.own_bos:
            yield f"  {self.own_bos} prompts begin with BOS, and get no second one"
        cut = f"{self.truncated_prompts} prompts and {self.truncated_responses} responses"
        yield "  truncated {} (max_length {}, max_prompt_length {})".format(cut, *self.limits)
        if self.truncated_messages:
            what = f"{self.truncated_messages} prompts of messages lost their beginning, with any system turn"
            yield f"  warning: {what}; raise data.max_prompt_length to keep them whole"
        for part, lengths in self.lengths.items():
            part = "response" if single and part == "chosen" else part
            median, most = np.percentile(lengths, (50, 95))
            few = f"median {median:.0f}, 95 % at most {np.ceil(most):.0f}, longest {max(lengths)}"
            yield f"  {part} tokens before any cut: {few}"
        if self.unscored_tokens:
            yield f"  {self.unscored_tokens} tokens in responses are not scored: others wrote them"


def dropped_lines(dropped: Mapping[str, Sequence], unit: str) -> Iterator[str]:
    """One line per reason: how many were dropped, and the first few of their places, called `unit`."""
    for reason, places in dropped.items():
        different = list(dict.fromkeys(places))  # A record may have several pairs.
        first = ", ".join(map(str, different[:_FIRST_FEW])) + (", ..." if len(different) > _FIRST_FEW else "")
        yield f"dropped {len(places)}: {reason} ({unit} {first})"
