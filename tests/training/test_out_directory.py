"""One run, one directory: a second process is refused, and a dead one leaves nothing in the way."""

import os
import shutil
import signal

import pytest

import train_dpo
from minidpo.errors import UserError
from minidpo.training.out_directory import lock_directory
from tiny import forked, small_files


def test_second_process(config, tmp_path):
    """It is refused until the first one is dead, however it died."""
    reader, writer = os.pipe()
    first = os.fork()
    if first == 0:
        lock_directory(tmp_path / "out")
        os.write(writer, b".")
        signal.pause()  # It holds the directory until it is killed.
    try:
        assert os.read(reader, 1) == b"."
        with pytest.raises(UserError, match=rf"out: another run is at work in it \(process {first}\)"):
            train_dpo.main(config())
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    lock_directory(tmp_path / "out")
    lock_directory(tmp_path / "out")  # The same process may run again; but no other, even its child.
    assert forked(lambda: lock_directory(tmp_path / "out")) != 0


@pytest.mark.parametrize("part", ["", "checkpoints", "tokens", "samples"])
def test_leftovers(tmp_path, part):
    """What killed runs left half done goes, or comes back; nothing else is touched, and no link followed."""
    place, theirs = tmp_path / "out" / part, tmp_path / "theirs"
    names = (".a.7.tmp", ".b.7.old", ".c.7.old", "c", "x.tmp", ".x.tmp")
    for path in (theirs, *(place / name for name in names)):
        path.mkdir(parents=True)
        (path / "f").write_text(path.name)
    (place / ".f.7.tmp").write_text("torn")
    (place / ".g.7.tmp").symlink_to(theirs)
    lock_directory(tmp_path / "out")
    assert {path.name for path in place.iterdir()} - {".lock"} == {"b", "c", "x.tmp", ".x.tmp"}
    assert (place / "b" / "f").read_text() == ".b.7.old"  # It had stepped aside for a new one.
    assert (place / "c" / "f").read_text() == "c" and (theirs / "f").read_text() == "theirs"


@pytest.mark.parametrize("there", [True, False], ids=["to files", "to nowhere"])
def test_links(config, tmp_path, there):
    """What a run writes takes the place of a link; what the link points to stays as it is."""
    files = [".lock", "config.toml", "metrics.jsonl", "reference.safetensors"]
    directories, others, out = ["final", "samples"], tmp_path / "others", tmp_path / "out"
    out.mkdir()
    for name in directories:
        (others / name).mkdir(parents=True)
    for name in [*files, *(f"{directory}/step-0.jsonl" for directory in directories)] if there else []:
        (others / name).write_text("theirs")
    for name in files + directories:
        (out / name).symlink_to(others / name)
    before = sorted(others.rglob("*"))
    for _ in range(2):
        train_dpo.main(config(eval__samples=2, eval__max_new_tokens=4, optim__max_steps=1))
    assert sorted(others.rglob("*")) == before
    assert all(path.read_text() == "theirs" for path in before if path.is_file())
    assert not any(path.is_symlink() for path in out.rglob("*"))


@pytest.mark.parametrize("name", ["", "checkpoints", "tokens"])
@pytest.mark.parametrize("kind", ["file", "link to a file", "link to nowhere"])
def test_parts_in_the_way(config, tmp_path, name, kind):
    """What a run can neither use nor replace is told before it reads any data, and stays as it is."""
    out, theirs, arguments = tmp_path / "out", tmp_path / "theirs", [*config(), "--data.train=missing.jsonl"]
    (out / name).parent.mkdir(exist_ok=True)
    if kind != "link to nowhere":
        theirs.write_text("theirs")
    theirs.rename(out / name) if kind == "file" else (out / name).symlink_to(theirs)
    before = (out / name).lstat(), sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=rf"^{out / name}: no directory, .*; see run.out in .*config.toml$"):
        train_dpo.main(arguments)
    assert ((out / name).lstat(), sorted(tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("file", ["out/notes.txt", "notes.txt"])
def test_starts_anew(config, tmp_path, capsys, file):
    """A directory that has files, of others or of a killed run, but no checkpoint, is told."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("theirs")
    told = []
    for _ in range(2):
        train_dpo.main(config(optim__max_steps=1))
        shutil.rmtree(tmp_path / "out" / "checkpoints")
        told.append("has files but no checkpoint: the run starts anew" in capsys.readouterr().out)
    assert told == [file == "out/notes.txt", True]


def test_another_disk(config, tmp_path):
    """checkpoints/ and final/ that were moved away and linked back are read, and stop no later start."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    train_dpo.main(config(optim__max_steps=2))
    disk.mkdir()
    for name in ("final", "checkpoints/step-2", "checkpoints"):
        shutil.move(out / name, disk / name.replace("/", "-"))
        (out / name).symlink_to(disk / name.replace("/", "-"))
    for steps in (2, 3, 4):
        train_dpo.main(config(optim__max_steps=steps))
        assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{steps}"]
    assert (disk / "final" / "model.safetensors").is_file() and not (out / "final").is_symlink()
    assert (disk / "checkpoints-step-2" / "state.json").is_file()
    assert not any(path.name.endswith((".tmp", ".old")) for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("limit", [1000, 50_000])
def test_full_disk(config, limit, tmp_path):
    """The run ends in one line, and the same command goes on once there is room."""
    with small_files(limit), pytest.raises(UserError, match=r"^.*written.*$"):
        train_dpo.main(config())
    train_dpo.main(config())
    assert (tmp_path / "out" / "final").is_dir()


def test_no_directory(tmp_path):
    """A place that cannot be one is told in one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written \(Not a directory\)"):
        lock_directory(tmp_path / "file" / "out")
