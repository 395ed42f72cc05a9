"""What a user names to data files: a file, a pattern such as 'data/train-*', or a directory.

Of a directory its data files are read in the order of their names; if it has none, those of the one directory
in it that has (data sets of the Hugging Face hub keep theirs in data/). A choice that only the user can make,
such as between the splits train and test, is an error that lists what can be named.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from minidpo.errors import UserError
from minidpo.files import hub_name

TABLES = (".parquet", ".arrow")  # They are compressed inside, if at all.
READ = ".jsonl, .json or .csv, plain, .gz or .zst; .parquet or .arrow"

# What the package `datasets` and the Hugging Face hub write beside the data.
_ABOUT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

_ENDING = re.compile(r"(?i)(\.jsonl|\.json|\.csv)(\.gz|\.zst)?$|(\.parquet|\.arrow)$")
_SHARD = re.compile(r"\d{5}-of-\d{5}")
_HELD_OUT = re.compile(r"(?<![a-z])(test|validation|valid|val|dev|eval)(?![a-z])")


def kind_of(path: Path) -> str:
    """How a file is read, by the end of its name: .jsonl, .json, .csv or one of TABLES; empty for others."""
    ending = _ENDING.search(path.name)
    return (ending[1] or ending[3]).lower() if ending else ""


def data_files(names: Iterable[str | Path]) -> list[str]:
    """The files behind what a user named, in order. Each is one that can be opened and is of a known kind;
    raises `UserError` that says what should be named instead for anything else."""
    files: list[Path] = []
    for name in map(Path, names):
        found = [] if os.path.exists(name) else map(Path, sorted(glob.glob(str(name))))
        for path in [*found] or [name]:
            files += _of_directory(path) if os.path.isdir(path) else [_checked(path)]
    return [str(file) for file in files]


def data_file(name: str | Path) -> Path:
    """The one file behind what a user named, where records are counted through a single file."""
    files = data_files([name])
    if len(files) > 1:
        raise UserError(f"{name}: stands for {len(files)} files, and one is needed; name {_one_of(files)}")
    return Path(files[0])


def _checked(path: Path) -> Path:
    kind = kind_of(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file; name one ({READ}), and no pipe or device")
        path.open("rb").close()
    except OSError as error:
        right = f"name a file that can be read ({READ}), or a directory of such files"
        if name := hub_name(path):
            download = f"hf download --repo-type dataset {name} --local-dir data/{Path(name).name}"
            right = f"if it is a data set of the Hugging Face hub, download it first: {download}"
        elif not kind:
            right += "; on the command line a comma separates two"
        raise UserError(f"{path}: {error.strerror}; {right}") from None
    if not kind:
        raise UserError(f"{path}: not a kind of file that is read ({READ}); convert it to .jsonl")
    return path


def _of_directory(directory: Path) -> list[Path]:
    try:
        entries = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{directory}: {error.strerror}; name a directory that can be read") from None
    _require_data({path.name for path in entries}, directory)
    files = [path for path in entries if path.is_file() and _is_data(path)]
    if not files:
        inside = [path for path in entries if path.is_dir() and any(map(_is_data, path.rglob("*")))]
        if not inside:
            raise UserError(f"{directory}: a directory without a data file; {READ} is read")
        if len(inside) > 1:
            names = sorted(
                {_SHARD.sub("*", path.name) for each in inside for path in each.iterdir() if _is_data(path)}
            )
            of_all = next((f"; or, of all, '{directory}/*/{name}'" for name in names if "train" in name), "")
            what = f"{directory}: has its data in several directories"
            raise UserError(f"{what}; name {_one_of(inside)}{of_all}")
        return _of_directory(inside[0])
    endings = {
        match[0].lower(): match[0] for match in map(_ENDING.search, (file.name for file in files)) if match
    }
    if len(endings) > 1:
        choices = [directory / f"*{endings[ending]}" for ending in sorted(endings)]
        raise UserError(f"{directory}: holds files of several kinds; name {_one_of(choices)}")
    splits = sorted({_SHARD.sub("*", path.name) for path in files})
    held_out = {match and match[1] for match in map(_HELD_OUT.search, map(str.lower, splits))}
    if len(splits) > 1 and (len(held_out) > 1 or any("*" in split for split in splits)):
        choices = [directory / split for split in splits]
        raise UserError(f"{directory}: holds several splits; name {_one_of(choices)}")
    return [_checked(path) for path in files]


def _is_data(path: Path) -> bool:
    return bool(kind_of(path)) and path.name not in _ABOUT_DATA


def _require_data(names: set[str], directory: Path) -> None:
    """Raises UserError for the directory of an adapter, a model or a run of minidpo."""
    is_model = any(name.endswith((".safetensors", ".bin")) for name in names)
    if "adapter_config.json" in names:
        what = "an adapter"
    elif is_model and "config.json" in names:
        what = "a model"
    elif {"config.toml", "metrics.jsonl"} <= names:
        what = "the directory of a run"
    else:
        return
    raise UserError(f"{directory}: {what}, where preferences are needed; name files of data ({READ})")


def _one_of(choices: Sequence[str | Path]) -> str:
    """Up to five of them, quoted for a shell."""
    first = ", ".join(f"'{choice}'" for choice in choices[:5])
    return f"one of {first}{', ...' if len(choices) > 5 else ''}"
