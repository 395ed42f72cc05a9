"""Files are whole or not there, and metrics of a resumed run have no line twice."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from minidpo.errors import UserError
from minidpo.files import (
    fingerprint,
    read_arrays,
    replacing_directory,
    replacing_file,
    require_place,
    require_regular,
    write_arrays,
    write_file,
)
from minidpo.log import Progress, duration, keep_metrics
from minidpo.model import save_model
from minidpo.tools import vectors
from tiny import tiny_model


@pytest.mark.parametrize(("replacing", "inside"), [(replacing_file, "."), (replacing_directory, "f")])
def test_failure(tmp_path, replacing, inside):
    """What fails half-way leaves the old one as it was."""
    for content in ("one", "two"):
        with replacing(tmp_path / "a") as temporary:
            (temporary / inside).write_text(content)
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as temporary:
        (temporary / inside).write_text("thr")
        raise RuntimeError
    assert (tmp_path / "a" / inside).read_text() == "two"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_mode(tmp_path):
    """Weights may be read by whoever the umask allows; safetensors alone would make them mode 600."""
    before = os.umask(0o027)
    try:
        with replacing_directory(tmp_path / "a") as directory:
            save_model(tiny_model(), directory)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "a").iterdir()} == {0o640}


@pytest.mark.parametrize("name", ["a.png", "link.png"])
def test_special_files(tmp_path, name):
    """No file takes the place of a pipe or a device, nor of a link to one: root would delete the device."""
    path, pipe, link = (tmp_path / each for each in (name, "a.png", "link.png"))
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for write in (
        lambda: require_place("--out", path),
        lambda: vectors.main(["--out", str(path)]),
        lambda: write_file(path, ""),
    ):
        with pytest.raises(UserError, match=rf"{path}: a device or a pipe, where a regular file"):
            write()
    assert pipe.is_fifo() and link.is_symlink()


def test_regular_files(tmp_path):
    """A link to a file, or to nowhere, is replaced; but not /dev/stdout, even where it leads to a file."""
    for target in ("file", "nowhere"):
        (tmp_path / "file").write_text("theirs")
        (tmp_path / "link").symlink_to(tmp_path / target)
        require_place("--out", tmp_path / "link")
        write_file(tmp_path / "link", "ours")
        assert (tmp_path / "link").read_text() == "ours" and (tmp_path / "file").read_text() == "theirs"
        (tmp_path / "link").unlink()
    for path in ("/dev/stdout", "/dev/fd/1"):
        with pytest.raises(UserError, match=path):
            require_regular(Path(path))


def test_spoilt_arrays(tmp_path):
    """No byte of a file of arrays can change unnoticed."""
    file, arrays = tmp_path / "a.safetensors", {"a": np.arange(3.0), "b": np.array([1, 2], np.int32)}
    write_arrays(file, arrays, {"files": "x"})
    found, about = read_arrays(file)
    assert about == {"files": "x"} and all(np.array_equal(found[name], arrays[name]) for name in arrays)
    content = file.read_bytes()
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError):
            read_arrays(file)


def test_fingerprints(tmp_path):
    """Fingerprints differ if contents, their order or their division differ, for texts and for files."""
    for name, content in (("f", "ab"), ("same", "ab"), ("other", "ac")):
        (tmp_path / name).write_text(content)
    assert len({fingerprint("a", "b"), fingerprint("ab"), fingerprint("b", "a")}) == 3
    assert fingerprint(tmp_path / "f") == fingerprint(tmp_path / "same") != fingerprint(tmp_path / "other")


BEFORE = b'{"step": 0, "x": 1.0}\n{"step": 1}\n'


@pytest.mark.parametrize(("last_step", "kept"), [(1, BEFORE), (0, b"")], ids=["checkpoint", "none"])
def test_metrics_of_a_resumed_run(tmp_path, last_step, kept):
    """Lines after the checkpoint are dropped, all if there is none, and a line that a kill has torn."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(BEFORE + b'{"step": 2}\n{"step": 3}\n{"ste')
    keep_metrics(path, last_step)
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"step": "x"}', b'{"step": NaN}', b"\xff", b'["step"]'], ids=range(5)
)
def test_spoilt_metrics(tmp_path, line):
    """A broken line before the last, which no kill has torn, is named, and the file stays as it is."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(BEFORE + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match="metrics.jsonl:3: .* is no line of metrics; delete it, or"):
        keep_metrics(path, 2)
    assert path.read_bytes() == BEFORE + line + b'\n{"step": 2}\n'


def test_progress(monkeypatch, capsys):
    """Off a terminal, long work says once a minute how far it is, in times as people say them."""
    assert [duration(seconds) for seconds in (8.41, 200, 7500)] == ["8.4s", "3m 20s", "2h 05m"]
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("sampling", 100, "responses")
    for _ in range(4):
        now[0] += 25
        progress.advance(10)
    # 30 in 75 s are 0.4 per second; the other 70 take 175 s.
    said = "sampling: 30/100 responses in 1m 15s (0.4 per second, 2m 55s left)\n"
    assert capsys.readouterr().err == said
