"""Files and directories that are either whole or absent: written beside their place, then renamed into it. A
link is replaced like a file: what is written never lands where it points to."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minidpo.errors import UserError, one_line

ADAPTER = (
    "it is an adapter: give the model that it belongs to, with --adapter for score, sample and explain, or"
    " merge it first (the final/ of a run is merged; peft: merge_and_unload, then save_pretrained)"
)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, the file written there takes the place of `path`."""
    require_regular(path)
    temporary = _beside(path, "tmp")
    remove(temporary)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    with writing(path), replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield a new temporary directory; when the block ends well, it takes the place of `path`."""
    temporary, aside = _beside(path, "tmp"), _beside(path, "old")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for part in (*filter(Path.is_file, temporary.rglob("*")), temporary):
            _sync(part)
        # A directory cannot be renamed over a full one, so the old one is renamed out of the way first. If
        # the process is killed between the two renames, `clear_leftovers` gives the old one its name back.
        if os.path.lexists(path):
            os.replace(path, aside)
        os.replace(temporary, path)
        _sync(path.parent)
        remove(aside)
    finally:
        remove(temporary)


def remove_directory(path: Path) -> None:
    """Delete a directory; if the process is killed half-way, no part of it is left under its name."""
    doomed = _beside(path, "tmp")
    os.replace(path, doomed)
    remove(doomed)


def remove(path: Path) -> None:
    """Delete what stands at `path`, if anything does: of a link the link alone, of a directory all of it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # What cannot be deleted stops no run.
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(directory: Path) -> None:
    """Undo what killed processes left half done in `directory`. No other process may be using it."""
    for path in directory.glob(".*"):
        match = re.fullmatch(r"\.(.+)\.\d+\.(tmp|old)", path.name)
        if match and match[2] == "old" and not os.path.lexists(directory / match[1]):
            os.replace(path, directory / match[1])
        elif match:
            remove(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full disk or a read-only directory raises while `path` is written into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be written ({reason}); make room, or write elsewhere") from None


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with writing(path), replacing_file(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def require_place(option: str, path: str | Path, *inputs: str | Path | None) -> None:
    """Raises UserError unless a file can be made at `path` that is none of `inputs`, nor in one that is a
    directory; called before the work."""
    taken, out = [Path(each).resolve() for each in inputs if each], Path(path).resolve()
    if out in taken or any(each.is_dir() and out.is_relative_to(each) for each in taken):
        raise UserError(f"{option} {path}: is read here, or in a directory that is; name a new one elsewhere")
    if not Path(path).parent.is_dir() or Path(path).is_dir():
        raise UserError(f"{option} {path}: a file in a directory that exists is needed")
    require_regular(Path(path), f"{option} ")


def require_regular(path: Path, option: str = "") -> None:
    """Raises UserError if a file at `path` would take the place of a device, a pipe or a socket."""
    special = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
    # Under `> file`, /dev/stdout is a link to a regular file, and /dev would lose that link.
    if special or re.fullmatch("/dev|/proc/.*", os.path.realpath(path.parent)):
        raise UserError(f"{option}{path}: a device or a pipe, where a regular file is needed")


def require_file(path: Path, hint: str) -> Path:
    """`path` if it is a file; otherwise raises UserError that names it and says what should be there."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {hint}")
    with path.open("rb") as file:
        require_no_pointer(path, file.read(100))
    return path


def require_no_pointer(path: Path, begin: bytes) -> None:
    """Raises UserError if a file that begins like this is the small one that git-lfs has for a large one."""
    if begin.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a git-lfs pointer, not the file; run git lfs pull in {path.parent}")


def require_model_file(directory: Path, name: str, hint: str = "") -> Path:
    """As `require_file`, for a file of a Hugging Face model directory, or of what was given for one."""
    hint = hint or "a Hugging Face model directory is needed"
    if (directory / "adapter_config.json").is_file():
        hint = ADAPTER
    elif (directory / "final" / name).is_file():  # the directory of a run
        hint += f"; {directory / 'final'} is one"
    elif directory.name == "final" and (saved := directory.parent / "checkpoints").is_dir():
        hint = f"the run is not finished: its command goes on with it; {saved} has what it has saved so far"
    elif hub := hub_name(directory):
        download = f"hf download {hub} --local-dir models/{directory.name}"
        hint += f"; if it is a model of the Hugging Face hub, download it first: {download}"
    return require_file(directory / name, hint)


def hub_name(path: Path) -> str:
    """ORG/NAME if `path` could be one of the Hugging Face hub, or an address there; empty for another."""
    name = re.sub(r"^(https?:/huggingface\.co|hf:)/(datasets/)?", "", str(path))
    of_file = "" if name == str(path) else "(/.*)?"
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)" + of_file, name)
    return match[1] if match and not path.parent.exists() else ""


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({one_line(error)}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON {type(content).__name__} where an object should be; fetch it again")
    return content


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray], about: dict[str, str]) -> None:
    """A safetensors file with texts about it, and a digest by which `read_arrays` knows a spoilt one."""
    # save_file would write to a file of another name first, which a killed process leaves behind.
    file.write_bytes(save(dict(arrays), metadata=about | {"digest": _digest(arrays, about)}))


def read_arrays(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What `write_arrays` wrote. Raises FileNotFoundError, or ValueError for a file that is not as it was."""
    try:
        with safe_open(file, framework="numpy") as stored:
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}
            about = stored.metadata() or {}
    except SafetensorError as error:
        raise ValueError(one_line(error)) from None
    if about.pop("digest", "") != _digest(arrays, about):
        raise ValueError("its content is not what was written")
    return arrays, about


def fingerprint(*parts: bytes | str | Path) -> str:
    """Hex digest of texts, bytes and whole files, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                part = hashlib.file_digest(file, "sha256").digest()
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _digest(arrays: Mapping[str, np.ndarray], about: dict[str, str]) -> str:
    texts = json.dumps(sorted(about.items()))
    parts = (part for name in sorted(arrays) for part in (name, arrays[name].tobytes()))
    return fingerprint(texts, *parts)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _sync(path: Path) -> None:
    """Wait until the disk has the contents: a rename may otherwise survive a power cut that they do not."""
    if os.name == "nt" and path.is_dir():  # Windows opens no directories.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
