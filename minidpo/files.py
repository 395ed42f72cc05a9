"""Files and directories that are either whole or absent: written beside their place, then renamed into it."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minidpo.errors import UserError, one_line


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, the file written there takes the place of `path`."""
    temporary = _beside(path, "tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield a new temporary directory; when the block ends well, it takes the place of `path`."""
    temporary, aside = _beside(path, "tmp"), _beside(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for part in (*temporary.iterdir(), temporary):
            _sync(part)
        # A directory cannot be renamed over a full one, so the old one is renamed out of the way first. If
        # the process is killed between the two renames, `clear_leftovers` gives the old one its name back.
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        _sync(path.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory; if the process is killed half-way, no part of it is left under its name."""
    doomed = _beside(path, "tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def clear_leftovers(directory: Path) -> None:
    """Undo what killed processes left half done in `directory`. No other process may be using it."""
    for path in directory.glob(".*"):
        match = re.fullmatch(r"\.(.+)\.\d+\.(tmp|old)", path.name)
        if match and match[2] == "old" and not (directory / match[1]).exists():
            os.replace(path, directory / match[1])
        elif match and path.is_dir():
            shutil.rmtree(path)
        elif match:
            path.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only directory raises while `path` is written into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); make room, or write elsewhere") from None


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object per line; the file is whole or absent."""
    with writing(path), replacing_file(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def require_place(option: str, path: str | Path) -> None:
    """Raises UserError that names the option unless a file can be made at `path`; called before the work."""
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        raise UserError(f"{option} {path}: a file in a directory that exists is needed")


def require_file(path: Path, hint: str) -> Path:
    """`path` if it is a file; otherwise raises UserError that names it and says what should be there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {hint}")
    return path


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON {type(content).__name__} where an object should be; fetch it again")
    return content


def fingerprint(*parts: bytes | str | Path) -> str:
    """Hex digest of texts, bytes and whole files, in order: equal contents give equal fingerprints."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                part = hashlib.file_digest(file, "sha256").digest()
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _sync(path: Path) -> None:
    """Wait until the disk has the contents: a rename may otherwise survive a power cut that they do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
