"""Runs killed with SIGKILL at random moments, in their saves too, end as if nothing had happened."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import runs
import train_dpo
import train_rm

KILLS = 12  # of each script
STEPS = 8

# Every run is forked from one server that has imported torch: a process of its own would take seconds to start.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "train_dpo", "train_rm"])

SETTINGS = {
    "optim__max_steps": STEPS,
    "run__save_every": 1,
    "run__eval_every": 3,
    "run__threads": 1,
}


def started(script, arguments: list[str], out: Path):
    process = processes.Process(target=script.main, args=([*arguments, f"--run.out={out}"],))
    process.start()
    return process


def metrics(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in runs.metrics(out)]


def half_done(out: Path, process: int | str = "*") -> bool:
    """Whether something stands in `out` that a process (any) was about to rename."""
    return any(path for kind in ("tmp", "old") for path in out.rglob(f".*.{process}.{kind}"))


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights_and_metrics(script, config, tmp_path):
    arguments = config(**SETTINGS)
    whole = tmp_path / "whole"
    first = started(script, arguments, whole)  # and the server
    first.join()
    began = time.monotonic()
    started(script, arguments, tmp_path / "timed").join()
    duration = time.monotonic() - began
    expected = load_file(whole / "final" / "model.safetensors")
    assert len(metrics(whole)) == STEPS + 4  # evaluated at steps 0, 3, 6 and 8

    draw, kills, in_a_write, rounds = random.Random(), 0, 0, 0
    while kills < KILLS or not in_a_write:
        rounds += 1
        out = tmp_path / f"killed-{rounds}"
        while True:
            process = started(script, arguments, out)
            process.join(draw.uniform(0, 1.5 * duration))
            process.kill()
            process.join()
            if process.exitcode == 0:
                break
            assert process.exitcode < 0, "it ended by itself, and not well"
            kills += 1
            in_a_write += half_done(out, process.pid)
        found = load_file(out / "final" / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert metrics(out) == metrics(whole)
        assert not half_done(out) and len(list((out / "checkpoints").iterdir())) == 1
    print(f"{kills} kills in {rounds} runs, {in_a_write} of them in a write; a run takes {duration:.2f}s")
