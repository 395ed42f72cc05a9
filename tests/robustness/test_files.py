"""Files are whole or not there, and metrics of a resumed run have no line twice."""

import json
import time

import pytest

from minidpo.files import fingerprint, replacing_directory, replacing_file
from minidpo.log import MetricsFile, Progress, duration


@pytest.mark.parametrize(("replacing", "inside"), [(replacing_file, "."), (replacing_directory, "f")])
def test_what_fails_half_way_leaves_the_old_one(tmp_path, replacing, inside):
    path = tmp_path / "a"
    for content in ("one", "two"):
        with replacing(path) as temporary:
            (temporary / inside).write_text(content)
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        (temporary / inside).write_text("thr")
        raise RuntimeError
    assert (path / inside).read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprints_tell_content_and_its_division_apart(tmp_path):
    (tmp_path / "f").write_bytes(b"ab")
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint("b", "a")
    before = fingerprint(tmp_path / "f")
    assert fingerprint(tmp_path / "f") == before
    (tmp_path / "f").write_bytes(b"ac")
    assert fingerprint(tmp_path / "f") != before


@pytest.mark.parametrize(("last_step", "steps"), [(2, [0, 1, 2, 3]), (0, [3])])
def test_metrics_of_a_resumed_run(tmp_path, last_step, steps):
    """Lines after the checkpoint and a torn last line are dropped; without a checkpoint, all lines."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "eval/loss": 1.0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    MetricsFile(path, last_step).write({"step": 3, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == steps


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (8.41, 200, 7500)] == ["8.4s", "3m 20s", "2h 05m"]


def test_progress_off_a_terminal(monkeypatch, capsys):
    """Long work says how far it is once a minute."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("sampling", 100, "responses")
    for _ in range(4):
        now[0] += 25
        progress.advance(10)
    said = capsys.readouterr().err
    assert said == "sampling: 30/100 responses in 1m 15s (0.4 per second, 2m 55s left)\n"
