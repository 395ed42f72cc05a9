"""Runs killed with SIGKILL at random moments, in their saves too, end as if nothing had happened."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

import train_dpo
import train_rm
from runs import final, metrics

KILLS = 12  # of each script

# Every run is forked from one server that has imported torch: a process of its own would take seconds to
# start.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "train_dpo", "train_rm"])


def half_done(out: Path, process: int | str = "*") -> bool:
    """Whether `out` holds what a process (by default any) has written or moved aside and not finished."""
    return any(path for kind in ("tmp", "old") for path in out.rglob(f".*.{process}.{kind}"))


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])
def test_random_kills(script, config, tmp_path):
    """The same command, run again and again, ends with the same weights and metrics, bit for bit."""
    settings = config(optim__max_steps=8, run__save_every=1, run__eval_every=3, run__threads=1)

    def run(out: Path, most_seconds: float | None = None):
        """A process that has run into `out`, and was killed after so many seconds."""
        process = processes.Process(target=script.main, args=([*settings, f"--run.out={out}"],))
        process.start()
        process.join(most_seconds)
        process.kill()
        process.join()
        return process

    def logged(out: Path) -> list[dict]:
        return [line | {"tokens_per_s": 0} for line in metrics(out)]

    whole = tmp_path / "whole"
    run(whole)  # This starts the server too, so that its start is not timed below.
    began = time.monotonic()
    run(tmp_path / "timed")
    duration = time.monotonic() - began

    draw, kills, in_a_write, rounds = random.Random(), 0, 0, 0
    while kills < KILLS or not in_a_write:
        rounds += 1
        out = tmp_path / f"killed-{rounds}"
        while (process := run(out, draw.uniform(0, 1.5 * duration))).exitcode != 0:
            assert process.exitcode < 0, "it ended by itself, and not well"
            kills += 1
            in_a_write += half_done(out, process.pid)
        assert final(out).keys() == final(whole).keys() and logged(out) == logged(whole)
        assert all(torch.equal(weight, final(whole)[name]) for name, weight in final(out).items())
        assert not half_done(out) and len(list((out / "checkpoints").iterdir())) == 1
