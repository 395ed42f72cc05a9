"""What a user names to data files: a file, a pattern such as 'data/train-*', or a directory.

Of a directory its data files are read in the order of their names; if it has none, those of the one directory
in it that has. A choice that only the user can make, as between splits, is an error that lists them.
"""

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from minidpo.data.bad_record import printable
from minidpo.errors import UserError
from minidpo.files import hub_name

TABLES = (".parquet", ".arrow")  # They are compressed inside, if at all.
READ = ".jsonl, .json or .csv, plain, .gz or .zst; .parquet or .arrow"

# What the package `datasets` and the Hugging Face hub write beside the data.
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

# Directories without data, by the names of two of their files.
_OTHERS = {
    "an adapter": {"adapter_config.json"},
    "a model": {"config.json", "tokenizer.json"},
    "the directory of a run": {"config.toml", "metrics.jsonl"},
}

_ENDING = re.compile(r"(?i)(\.jsonl|\.json|\.csv)(\.gz|\.zst)?$|(\.parquet|\.arrow)$")
_SHARD = re.compile(r"\d{5}-of-\d{5}")
_HELD_OUT = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])")


def kind_of(path: Path) -> str:
    """How a file is read, by the end of its name: .jsonl, .json, .csv or one of TABLES; empty for others."""
    ending = _ENDING.search(path.name)
    return (ending[1] or ending[3]).lower() if ending else ""


def data_files(names: Iterable[str | Path]) -> list[str]:
    """The files behind what a user named, in order. Raises `UserError` unless all can be read."""
    files: list[Path] = []
    for name in map(Path, names):
        found = [] if name.exists() else sorted(glob.glob(str(name)))
        for path in map(Path, found or [str(name)]):
            files += _of_directory(path) if path.is_dir() else [_checked(path)]
    return [str(file) for file in files]


def _checked(path: Path) -> Path:
    kind = kind_of(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file; name one ({READ}), and no pipe or device")
    try:
        path.open("rb").close()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        right = f"name a file that can be read ({READ}), or a directory of such files"
        if name := hub_name(path):
            download = f"hf download --repo-type dataset {name} --local-dir data/{Path(name).name}"
            right = f"if it is a data set of the Hugging Face hub, download it first: {download}"
        raise UserError(f"{printable(str(path))}: {getattr(error, 'strerror', error)}; {right}") from None
    if not kind:
        raise UserError(f"{path}: not a kind of file that is read ({READ}); convert it to .jsonl")
    return path


def _of_directory(directory: Path) -> list[Path]:
    try:
        entries = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; name a directory that can be read") from None
    for what, names in _OTHERS.items():
        if names <= {path.name for path in entries}:
            raise UserError(f"{directory}: {what}, where preferences are needed; name files of data ({READ})")
    files = [path for path in entries if path.is_file() and _is_data(path)]
    if not files:
        inside = [path for path in entries if path.is_dir() and any(map(_is_data, path.rglob("*")))]
        if not inside:
            raise UserError(f"{directory}: a directory without a data file; {READ} is read")
        if len(inside) > 1:
            raise UserError(f"{directory}: has its data in several directories; name {one_of(inside)}")
        return _of_directory(inside[0])
    # Shards are one split. Other files are one if they are of a kind and not named like several splits.
    splits = sorted({_SHARD.sub("*", path.name) for path in files})
    endings = {match[0].lower() for match in map(_ENDING.search, splits) if match}
    held_out = {match and match[1] for match in map(_HELD_OUT.search, map(str.lower, splits))}
    are_splits = len(splits) > 1 and (len(held_out) > 1 or any("*" in split for split in splits))
    if are_splits or len(endings) > 1:
        choices = one_of([directory / split for split in splits])
        raise UserError(f"{directory}: holds several splits or kinds of files; name {choices}")
    return [_checked(path) for path in files]


def _is_data(path: Path) -> bool:
    return bool(kind_of(path)) and path.name not in _ABOUT_DATA


def one_of(choices: Sequence[str | Path]) -> str:
    """Up to five of them, quoted for a shell."""
    first = ", ".join(f"'{choice}'" for choice in choices[:5])
    return f"one of {first}{', ...' if len(choices) > 5 else ''}"
