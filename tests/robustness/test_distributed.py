"""Several processes, one run: torchrun with gloo on the CPU. Two or four processes train what one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import Backend, BackendConfig

import train_dpo
import train_rm
from minidpo.data import micro_batches
from minidpo.distributed import launch
from runs import metrics

ROOT = Path(__file__).parents[2]
STEPS = 20
# Batches of 5 pairs of about 60 tokens: three or four passes of one process, an empty one among those of four.
SETTINGS = {
    "optim__max_steps": STEPS,
    "optim__epochs": 10,
    "optim__batch_size": 5,
    "optim__micro_tokens": 128,
    "optim__lr": 3e-4,
}


@contextmanager
def torchrun(processes: int, script: str, *arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finished(processes: int, script: str, *arguments: str) -> str:
    """What a run that ends well prints."""
    with torchrun(processes, script, *arguments) as process:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    return output


def largest_difference(one: Path, other: Path) -> float:
    """Over all logged numbers but the speed, and all weights of final/, relative where they exceed 1."""
    ours, theirs = metrics(one), metrics(other)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    values = [
        (line[k], twin[k])
        for line, twin in zip(ours, theirs, strict=True)
        for k in line
        if k != "tokens_per_s"
    ]
    found = [abs(a - b) / max(1, abs(b)) for a, b in values]
    weights, expected = (load_file(out / "final" / "model.safetensors") for out in (one, other))
    assert weights.keys() == expected.keys()
    return max([*found, *((weights[k] - expected[k]).abs().max().item() for k in expected)])


@pytest.mark.slow
def test_two_and_four_processes_train_what_one_does(config, tmp_path):
    arguments = config(**SETTINGS, run__eval_every=10)
    train_dpo.main([*arguments, f"--run.out={tmp_path / '1'}"])
    finished(2, "train_dpo.py", *arguments, f"--run.out={tmp_path / '2'}")
    less_memory = "--run.activation_checkpointing=true"
    finished(4, "train_dpo.py", *arguments, less_memory, f"--run.out={tmp_path / '4'}")
    assert len(metrics(tmp_path / "1")) == STEPS + 3
    differences = [largest_difference(tmp_path / n, tmp_path / "1") for n in ("2", "4")]
    print(f"largest differences from one process: {differences}")
    assert max(differences) < 1e-5


@pytest.mark.slow
def test_a_reward_model_over_several_processes_is_that_of_one(config, tmp_path):
    arguments = config(**SETTINGS)
    train_rm.main([*arguments, f"--run.out={tmp_path / 'one'}"])
    finished(3, "train_rm.py", *arguments, f"--run.out={tmp_path / 'several'}")
    assert largest_difference(tmp_path / "several", tmp_path / "one") < 1e-5


@pytest.mark.slow
def test_bf16_over_several_processes_learns_as_one_does(config, tmp_path):
    """Sharded weights are rounded when they are gathered, the embedding too, which one process leaves in float32: the
    losses differ by what bf16 rounds, and an accuracy by a pair that stood at the edge."""
    arguments = config(**SETTINGS, run__dtype='"bf16"')
    train_rm.main([*arguments, f"--run.out={tmp_path / 'one'}"])
    finished(2, "train_rm.py", *arguments, f"--run.out={tmp_path / 'several'}")
    losses = [[line["loss"] for line in metrics(tmp_path / n) if "loss" in line] for n in ("one", "several")]
    assert len(losses[0]) == STEPS
    np.testing.assert_allclose(*losses, rtol=0.01)


@pytest.mark.slow
def test_killing_one_process_ends_all_and_any_number_goes_on(config, tmp_path):
    arguments = config(**SETTINGS, run__save_every=1)
    train_dpo.main([*arguments, f"--run.out={tmp_path / 'whole'}"])
    out = tmp_path / "killed"
    with torchrun(2, "train_dpo.py", *arguments, f"--run.out={out}") as process:
        while not list(out.glob("checkpoints/step-*")):
            time.sleep(0.01)
            assert process.poll() is None, process.communicate()[0]
        rank_0 = int((out / ".lock").read_text())
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        victim = next(pid for pid in map(int, workers.split()) if pid != rank_0)
        os.kill(victim, signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        assert process.returncode != 0
    assert (
        "error: another of the 2 processes ended; the same command goes on from the last checkpoint" in output
    )
    step = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
    output = finished(4, "train_dpo.py", *arguments, f"--run.out={out}")
    assert f"resuming from {out / 'checkpoints'}/step-{step}" in output and step < STEPS
    assert largest_difference(out, tmp_path / "whole") < 1e-5


@pytest.mark.slow
def test_processes_that_share_out_the_sampling_say_what_all_have_sampled(config, tmp_path):
    arguments = config(**SETTINGS, eval__samples=5, eval__max_new_tokens=12) + ["--optim.max_steps=2"]
    finished(2, "train_dpo.py", *arguments)
    first, *_, last = (line for line in metrics(tmp_path / "out") if "eval/kl" in line)
    lines = [json.loads(line) for line in (tmp_path / "out/samples/step-2.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and len({line["prompt"] for line in lines}) == 5
    assert first["eval/kl"] < 1e-9 < last["eval/kl"]
    assert last["eval/sample_length"] == np.mean([line["tokens"] for line in lines])


@pytest.mark.slow
def test_a_stop_signal_reaches_all_and_they_save_the_same_step(config, tmp_path):
    arguments = config(**SETTINGS) + ["--optim.epochs=10000", "--optim.max_steps=0"]
    out = tmp_path / "out"
    with torchrun(2, "train_dpo.py", *arguments) as process:
        while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 4:
            time.sleep(0.05)
            assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert output.count("stopped after step") == 1 and process.returncode != 0, output
    assert len(list((out / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_several_processes_tell_an_error_once(config):
    with torchrun(2, "train_dpo.py", *config(), "--model.path=nowhere") as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and output.count("error: nowhere") == 1, output


@pytest.mark.slow
def test_processes_that_do_not_see_the_same_run_directory_stop(config, tmp_path):
    arguments = config(**SETTINGS)
    train_dpo.main([*arguments, "--optim.max_steps=2", f"--run.out={tmp_path / 'one'}"])
    shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / "machine-0" / "checkpoints")
    script = tmp_path / "one_directory_a_process.py"
    script.write_text(
        "import os, runpy, sys\n"
        "sys.path.insert(0, os.getcwd())\n"
        f"sys.argv.append('--run.out={tmp_path}/machine-' + os.environ['RANK'])\n"
        "runpy.run_path('train_dpo.py', run_name='__main__')\n"
    )
    with torchrun(2, str(script), *arguments) as process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode != 0, output
    assert output.count("error: process 1 has the step of the last checkpoint = 0, process 0 has 2;") == 1, (
        output
    )


@pytest.mark.slow
def test_a_process_whose_peer_has_left_before_it_still_ends_well(tmp_path):
    script = tmp_path / "one_leaves_first.py"
    script.write_text(
        "import os, sys, time\n"
        "sys.path.insert(0, os.getcwd())\n"
        "from minidpo.distributed import any_rank, launch, rank\n"
        "def main(arguments):\n"
        "    any_rank(True)\n"
        "    if rank() == 1:\n"
        "        time.sleep(1)  # rank 0 waits in leave\n"
        "        os._exit(0)\n"
        "launch(main)([])\n"
    )
    finished(2, str(script))


@pytest.mark.parametrize("gpu", [False, True])
def test_what_is_on_the_cpu_has_gloo_also_where_there_is_a_gpu(monkeypatch, gpu):
    chosen = {}

    def note(backend: str = "undefined", **rest) -> None:
        chosen.update(BackendConfig(Backend(backend)).get_device_backend_map())

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *_: torch.device("cuda" if gpu else "cpu"))
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", note)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    launch(lambda arguments: None)([])
    assert chosen["cpu"] == "gloo" and (not gpu or chosen["cuda"] == "nccl")


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(40, 100), st.integers(1, 7))
def test_ranks_make_as_many_passes_and_share_every_pair_once(lengths, micro_tokens, ranks):
    rows, tokens = np.arange(len(lengths)) + 100, np.array(lengths, dtype=int)
    shares = [micro_batches(rows, tokens, micro_tokens, rank, ranks) for rank in range(ranks)]
    if ranks > 1:
        assert len({len(share) for share in shares}) == 1
    drawn = [row for share in shares for members in share for row in members]
    assert sorted(drawn) == rows.tolist()
    assert all(tokens[members - 100].sum() <= micro_tokens for share in shares for members in share)
