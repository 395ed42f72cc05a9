"""Several processes, one run: torchrun with gloo on the CPU. Two or four processes train what one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, BackendConfig

import train_dpo
import train_rm
from families import FAMILIES
from minidpo.distributed import launch
from minidpo.model import save_model
from runs import final, metrics
from tiny import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(config) -> list[str]:
    """Five pairs of about 60 tokens per step: four passes of one process, an empty one among those of four."""
    sizes = dict(optim__batch_size=5, optim__micro_tokens=128)
    return config(optim__max_steps=20, optim__epochs=10, optim__lr=3e-4, **sizes)


@contextmanager
def torchrun(processes: int, script: str | Path, *arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(script), *arguments]
    # If a process crashes, all its threads say where they are.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def output(processes: int, script: str | Path, *arguments: str, fails: bool = False) -> str:
    """What a run prints that ends well, or with an error."""
    # About once in a million calls, the collectives of PyTorch 2.13 that DTensor uses spoil the memory of a
    # process over gloo (a loop of theirs alone does it, in native code). The same command goes on then.
    for _ in range(2):
        with torchrun(processes, script, *arguments) as process:
            said = process.communicate(timeout=240)[0]
        if not any(f"({signal})" in said for signal in ("SIGSEGV", "SIGABRT")):
            break
        warnings.warn(said, stacklevel=2)
    assert (process.returncode != 0) == fails, said
    return said


def wait_for(process: subprocess.Popen, condition) -> None:
    while not condition():
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]


def require_same_run(one: Path, other: Path) -> None:
    """The same metrics but for the speed, and the same weights, to the rounding of sums in another order."""
    for line, twin in zip(metrics(one), metrics(other), strict=True):
        assert line | {"tokens_per_s": 0} == pytest.approx(twin | {"tokens_per_s": 0}, rel=1e-5, abs=1e-5)
    for name, weight in final(one).items():
        torch.testing.assert_close(weight, final(other)[name], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "processes", "keys", "family"),
    [
        (train_dpo, 2, "--run.eval_every=10", "llama"),
        (train_dpo, 4, "--run.activation_checkpointing=true", "llama"),
        (train_dpo, 2, "--loss.name=kto", "llama"),
        (train_rm, 3, "--run.eval_every=10", "llama"),
        (train_dpo, 2, "--lora.rank=3 --run.save_every=10", "llama"),
        (train_rm, 3, "--lora.rank=2 --run.activation_checkpointing=true", "llama"),
        *((train_dpo, 2, "--optim.max_steps=3", name) for name in ("phi4 mini", "granite", "olmo2")),
    ],
)
def test_same_run(settings, world, tmp_path, script, processes, keys, family):
    """Several processes train what one does, whatever the family."""
    shutil.copytree(world / "model", tmp_path / "model")
    save_model(tiny_model(vocab_size=300, **FAMILIES[family]), tmp_path / "model")
    settings += [f"--model.path={tmp_path / 'model'}", *keys.split()]
    script.main([*settings, f"--run.out={tmp_path / 'one'}"])
    output(processes, f"{script.__name__}.py", *settings, f"--run.out={tmp_path / 'several'}")
    require_same_run(tmp_path / "several", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["", "--lora.rank=3 --lora.base_dtype=bf16 --lora.final_dtype=bf16"])
def test_bf16(settings, tmp_path, keys):
    """Sharded weights are rounded when they are gathered, the embedding too: losses differ by what bf16
    rounds."""
    settings += ["--run.dtype=bf16", *keys.split()]
    train_rm.main([*settings, f"--run.out={tmp_path / 'one'}"])
    output(2, "train_rm.py", *settings, f"--run.out={tmp_path / 'two'}")
    one, two = ([line["loss"] for line in metrics(tmp_path / n) if "loss" in line] for n in ("one", "two"))
    assert len(one) == 20 and two == pytest.approx(one, rel=0.01)


@pytest.mark.slow
def test_killed_process(settings, tmp_path):
    """All end with it, in one line, and any number of processes goes on from the last checkpoint."""
    train_dpo.main([*settings, f"--run.out={tmp_path / 'whole'}"])
    out = tmp_path / "killed"
    settings += ["--run.save_every=1", f"--run.out={out}"]
    with torchrun(2, "train_dpo.py", *settings) as process:
        wait_for(process, lambda: list(out.glob("checkpoints/step-*")))
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
        (other,) = set(workers.split()) - {(out / ".lock").read_text()}  # The lock is rank 0's.
        os.kill(int(other), signal.SIGKILL)
        said = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "error: another of the 2 processes ended; the same command goes on from the last" in said
    step = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
    assert f"resuming from {out / 'checkpoints'}/step-{step}\n" in output(4, "train_dpo.py", *settings)
    require_same_run(out, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", ["", "--lora.rank=4 --run.dtype=bf16 --lora.base_dtype=bf16 --optim.lr=1e-2"]
)
def test_sampling(settings, tmp_path, keys):
    """Processes that share out the prompts say what all have sampled."""
    settings += ["--optim.max_steps=2", "--eval.samples=5", "--eval.max_new_tokens=12", *keys.split()]
    output(2, "train_dpo.py", *settings)
    first, *_, last = (line for line in metrics(tmp_path / "out") if "eval/kl" in line)
    lines = [json.loads(line) for line in (tmp_path / "out/samples/step-2.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and len({line["prompt"] for line in lines}) == 5
    assert first["eval/kl"] < 1e-9 < last["eval/kl"]
    assert last["eval/sample_length"] == sum(line["tokens"] for line in lines) / 5


@pytest.mark.slow
def test_stop_signal(settings, tmp_path):
    """It reaches all, and they save the same step."""
    out = tmp_path / "out"
    with torchrun(2, "train_dpo.py", *settings, "--optim.epochs=10000", "--optim.max_steps=0") as process:
        wait_for(process, lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 3)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert said.count("stopped after step") == 1 and process.returncode != 0, said
    assert len(list((out / "checkpoints").iterdir())) == 1


@pytest.mark.slow
def test_error(config):
    """It is told once, not by each process."""
    said = output(2, "train_dpo.py", *config(), "--model.path=nowhere", fails=True)
    assert said.count("error: nowhere") == 1


@pytest.mark.slow
def test_other_directories(settings, tmp_path):
    """Processes that do not see the same run directory stop: only that of rank 0 has a checkpoint."""
    train_dpo.main([*settings, "--optim.max_steps=2", f"--run.out={tmp_path / 'one'}"])
    shutil.copytree(tmp_path / "one" / "checkpoints", tmp_path / "machine-0" / "checkpoints")
    script = tmp_path / "one_directory_per_process.py"
    script.write_text(f"""
import os, sys, train_dpo
from minidpo.errors import exit_on_user_error
from minidpo.distributed import launch
sys.argv.append("--run.out={tmp_path}/machine-" + os.environ["RANK"])
exit_on_user_error(launch(train_dpo.main))
""")
    told = "error: process 1 has the step of the last checkpoint = 0, process 0 has 2;"
    assert output(2, script, *settings, fails=True).count(told) == 1


@pytest.mark.slow
def test_peer_that_has_left(tmp_path):
    """A process whose peer has left before it still ends well."""
    script = tmp_path / "one_leaves_first.py"
    script.write_text("""
import os, time
from minidpo.distributed import any_rank, launch, rank
def main(arguments):
    any_rank(True)
    if rank() == 1:
        time.sleep(1)  # Rank 0 waits in leave.
        os._exit(0)
launch(main)([])
""")
    output(2, script)


@pytest.mark.parametrize("gpu", [False, True])
def test_backend(monkeypatch, gpu):
    """What is on the CPU has gloo, also where there is a GPU."""
    started = Mock()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", started)
    launch(lambda arguments: None)([])
    chosen = BackendConfig(Backend(*started.call_args.args)).get_device_backend_map()
    assert chosen["cpu"] == "gloo" and (not gpu or chosen["cuda"] == "nccl")
