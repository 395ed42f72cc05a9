"""Token pairs in flat arrays, in memory or in a cache on disk that later starts map instead of tokenizing again.

A cache is a directory that appears whole or not at all, named after a fingerprint of all it was made from: other
files, another tokenizer or other settings are another directory. One whose files have lost bytes is made anew.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minidpo.errors import UserError
from minidpo.files import replacing_directory
from minidpo.metrics import say
from minidpo.tokenizer import TokenPair

_IDS = "ids.bin"  # plain int32, so that it can be written as it grows
_BUFFER = 2**20  # ids held before they go to the file


@dataclass(frozen=True)
class PairTokens:
    """Tokenized pairs in flat arrays, so that a million of them are a few arrays and not six million lists."""

    ids: np.ndarray  # int32, all pairs one after the other, each prompt + chosen + rejected
    bounds: np.ndarray  # (pairs, 4) int64: start, end of prompt, end of chosen, end of rejected
    index: np.ndarray  # (pairs,) int64: the record's place in its file, for messages
    margin: np.ndarray | None = (
        None  # (pairs,) float64, NaN where a record has none; None where no record has
    )
    file: np.ndarray | None = None  # (pairs,) int64: which of `files` the record is from
    files: tuple[str, ...] = ()

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[TokenPair], files: tuple[str, ...] = (), ids_file: Path | None = None
    ) -> "PairTokens":
        """Collect `pairs`; with `ids_file` their ids are written there as they come, and mapped from it."""
        ids, bounds = array("i"), array("q")
        index, margin, file = array("q"), array("d"), array("q")
        start = 0
        with ids_file.open("wb") if ids_file else nullcontext() as out:
            for pair in pairs:
                bounds.append(start)
                for part in (pair.prompt, pair.chosen, pair.rejected):
                    ids.extend(part)
                    start += len(part)
                    bounds.append(start)
                index.append(pair.index)
                margin.append(float("nan") if pair.margin is None else pair.margin)
                file.append(pair.file)
                if out and len(ids) >= _BUFFER:
                    ids.tofile(out)
                    del ids[:]
            if out:
                ids.tofile(out)
        margins = np.asarray(margin)
        return cls(
            _map_ids(ids_file) if ids_file else np.asarray(ids, dtype=np.int32),
            np.asarray(bounds, dtype=np.int64).reshape(-1, 4),
            np.asarray(index, dtype=np.int64),
            None if np.isnan(margins).all() else margins,
            np.asarray(file, dtype=np.int64) if files else None,
            files,
        )

    def __len__(self) -> int:
        return len(self.bounds)

    @property
    def lengths(self) -> np.ndarray:
        """(pairs, 3): tokens of prompt, chosen, rejected."""
        return np.diff(self.bounds, axis=1)

    def select(self, rows: np.ndarray) -> "PairTokens":
        """The pairs at `rows`, over the same token array."""
        return replace(
            self,
            bounds=self.bounds[rows],
            index=self.index[rows],
            margin=None if self.margin is None else self.margin[rows],
            file=None if self.file is None else self.file[rows],
        )

    def records(self, rows: np.ndarray) -> str:
        """Where the pairs at `rows` come from, for messages: "records [3, 7] of a.jsonl, records [0] of b.jsonl"."""
        if self.file is None:
            return f"records {self.index[rows].tolist()}"
        return ", ".join(
            f"records {self.index[rows][self.file[rows] == file].tolist()} of {self.files[file]}"
            for file in np.unique(self.file[rows])
        )


@contextmanager
def cached_pairs(
    place: Path, build: Callable[[Path], tuple[PairTokens, list[str]]]
) -> Iterator[tuple[PairTokens, list[str]]]:
    """The pairs in the directory `place`, and the lines of the report that was made with them.

    Where there is none, or a torn one, `build(ids_file)` makes them, and they are put in place when the block ends
    well: a run that refuses its data or settings leaves nothing behind, not even the directories above. Raises
    `UserError` where the cache cannot be written.
    """
    stored = _load(place)
    if stored:
        say(f"token ids: mapped from {place}")
        yield stored
        return
    if place.exists():
        say(f"token ids: {place} has lost bytes and is made anew")
    missing = [directory for directory in (place.parent, *place.parent.parents) if not directory.exists()]
    made = False
    try:
        with replacing_directory(place) as temporary:
            pairs, lines = build(temporary / _IDS)
            _save(pairs, lines, temporary)
            made = True
            yield pairs, lines
    except OSError as error:
        if not made or _load(place) is None:  # otherwise another process put it there first: the same
            reason = error.strerror or error
            raise UserError(f"{place}: token ids cannot be written ({reason}); make room for them") from None
    finally:
        if not place.exists():
            with suppress(OSError):  # not empty: somebody else put something there
                for directory in missing:
                    directory.rmdir()


def _save(pairs: PairTokens, lines: list[str], directory: Path) -> None:
    for name in ("bounds", "index", "margin", "file"):
        values = getattr(pairs, name)
        if values is not None:
            np.save(directory / f"{name}.npy", values)
    sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
    meta = {"sizes": sizes, "files": pairs.files, "report": lines}
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _load(directory: Path) -> tuple[PairTokens, list[str]] | None:
    """What `_save` wrote; None where a part is missing or has another size."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        for name, size in meta["sizes"].items():
            if (directory / name).stat().st_size != size:
                return None
        paths = {name: directory / f"{name}.npy" for name in ("bounds", "index", "margin", "file")}
        arrays = {name: np.load(path) for name, path in paths.items() if path.name in meta["sizes"]}
        return PairTokens(_map_ids(directory / _IDS), files=tuple(meta["files"]), **arrays), meta["report"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _map_ids(file: Path) -> np.ndarray:
    return np.memmap(file, dtype=np.int32, mode="r").view(np.ndarray)
