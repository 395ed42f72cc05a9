"""One run, one directory: a second process is refused, and a dead one leaves nothing in the way."""

import os
import signal
import time

import pytest

import train_dpo
from minidpo.errors import UserError
from minidpo.out_directory import claim
from tiny import forked, small_files


def holder(out) -> int:
    """A process that holds `out` until it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        claim(out)
        os.write(writer, b".")
        time.sleep(60)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    return child


def test_a_second_process_in_one_out_is_refused_until_the_first_is_dead(config, tmp_path):
    first = holder(tmp_path / "out")
    try:
        with pytest.raises(UserError, match=rf"out: another run is at work in it \(process {first}\)"):
            train_dpo.main(config())
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    train_dpo.main(config())
    assert (tmp_path / "out" / "final").is_dir()


def test_the_same_process_may_run_again(tmp_path):
    claim(tmp_path)
    claim(tmp_path)
    assert forked(lambda: claim(tmp_path)) != 0  # but no other, even its child


def test_what_killed_runs_left_half_done_is_cleared_and_nothing_else(tmp_path):
    for part in ("", "checkpoints/", "tokens/"):
        for name in (".a.7.tmp", ".b.7.old", ".c.7.old", "c", "mine.tmp", ".mine.tmp"):
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / "f").write_text(name)
        (tmp_path / part / ".f.7.tmp").write_text("torn")
    claim(tmp_path)
    for part in ("", "checkpoints/", "tokens/"):
        names = {p.name for p in (tmp_path / part).iterdir()} - {"checkpoints", "tokens", ".lock"}
        assert names == {"b", "c", "mine.tmp", ".mine.tmp"}
        assert (tmp_path / part / "b" / "f").read_text() == ".b.7.old"  # it had stepped aside for a new one
        assert (tmp_path / part / "c" / "f").read_text() == "c"


@pytest.mark.parametrize("limit", [0, 1000, 50_000])
def test_a_run_on_a_full_disk_ends_in_one_line(config, limit, tmp_path):
    arguments = config()
    with small_files(limit), pytest.raises(UserError, match="written") as error:
        train_dpo.main(arguments)
    assert "\n" not in str(error.value)
    train_dpo.main(arguments)
    assert (tmp_path / "out" / "final").is_dir()


def test_a_place_that_cannot_be_a_directory_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written \(Not a directory\)"):
        claim(tmp_path / "file" / "out")
