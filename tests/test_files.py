"""Files are whole or not there, and metrics of a resumed run have no line twice."""

import json
import time

import pytest

from minidpo.files import fingerprint, replacing_directory, replacing_file
from minidpo.metrics import MetricsFile, Progress, duration


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing_file(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "d"
    for content in ("one", "two"):
        with replacing_directory(path) as temporary:
            (temporary / "f").write_text(content)
    with pytest.raises(RuntimeError), replacing_directory(path) as temporary:
        (temporary / "f").write_text("thr")
        raise RuntimeError
    assert (path / "f").read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprints_tell_content_and_its_division_apart(tmp_path):
    (tmp_path / "f").write_bytes(b"ab")
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint("b", "a")
    assert fingerprint(tmp_path / "f") == fingerprint(tmp_path / "f")
    before = fingerprint(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"ac")
    assert fingerprint(tmp_path / "f") != before


def test_resuming_drops_metrics_after_the_checkpoint_and_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    MetricsFile(path, last_step=2).write({"step": 3, "loss": 1.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (8.41, 200, 7500)] == ["8.4s", "3m 20s", "2h 05m"]


def test_a_run_without_a_checkpoint_begins_its_metrics_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n')  # will be evaluated again
    MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_long_work_off_a_terminal_says_how_far_it_is_once_a_minute(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("sampling", 100, "completions")
    for _ in range(4):
        now[0] += 25
        progress.advance(10)
    said = capsys.readouterr().err
    assert said == "sampling: 30/100 completions in 1m 15s (0.4 a second, 2m 55s left)\n"
