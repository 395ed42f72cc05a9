"""One run, one directory: a second process is refused, and a dead one leaves nothing in the way."""

import os
import signal

import pytest

import train_dpo
from minidpo.errors import UserError
from minidpo.training.out_directory import lock_directory
from tiny import forked, small_files


def test_second_process_is_refused(config, tmp_path):
    """Until the first one is dead, however it died."""
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
    train_dpo.main(config())
    assert (tmp_path / "out" / "final").is_dir()


def test_the_same_process_may_run_again(tmp_path):
    lock_directory(tmp_path)
    lock_directory(tmp_path)
    assert forked(lambda: lock_directory(tmp_path)) != 0  # but no other, even its child


@pytest.mark.parametrize("part", ["", "checkpoints", "tokens", "samples"])
def test_leftovers_are_cleared(tmp_path, part):
    """What killed runs left half done goes, or comes back; nothing else is touched."""
    for name in (".a.7.tmp", ".b.7.old", ".c.7.old", "c", "mine.tmp", ".mine.tmp"):
        (tmp_path / part / name).mkdir(parents=True)
        (tmp_path / part / name / "f").write_text(name)
    (tmp_path / part / ".f.7.tmp").write_text("torn")
    lock_directory(tmp_path)
    names = {path.name for path in (tmp_path / part).iterdir()} - {".lock"}
    assert names == {"b", "c", "mine.tmp", ".mine.tmp"}
    assert (tmp_path / part / "b" / "f").read_text() == ".b.7.old"  # it had stepped aside for a new one
    assert (tmp_path / part / "c" / "f").read_text() == "c"


@pytest.mark.parametrize("limit", [1000, 50_000])
def test_run_on_a_full_disk(config, limit, tmp_path):
    """It ends in one line, and the same command goes on once there is room."""
    arguments = config()
    with small_files(limit), pytest.raises(UserError, match="written") as error:
        train_dpo.main(arguments)
    assert "\n" not in str(error.value)
    train_dpo.main(arguments)
    assert (tmp_path / "out" / "final").is_dir()


def test_a_place_that_cannot_be_a_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written \(Not a directory\)"):
        lock_directory(tmp_path / "file" / "out")
