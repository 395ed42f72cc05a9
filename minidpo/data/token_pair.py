"""One prompt and its responses as token ids."""

from collections.abc import Iterator
from typing import NamedTuple

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
