"""What stops a run: numbers that are not finite, memory that runs out, signals. One line says what to do."""

import os
import signal
import sys
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

import train_dpo
from minidpo.config import DPOConfig, load_config
from minidpo.errors import STOPPED, RunStopped, exit_on_user_error
from minidpo.losses import DPO, BradleyTerry
from minidpo.training import device, reference, step
from minidpo.training import run as run_module

INF = float("inf")


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (lambda losses: losses.detach() * float("nan") + losses, "loss is nan"),
        (lambda losses: losses + INF, "loss is inf"),  # It adds no gradient.
        # The loss may be finite: sqrt(0) has a value, and no slope.
        (lambda losses: losses + (losses - losses.detach()).abs().sqrt(), "gradient norm is nan"),
    ],
)
def test_not_finite(config, monkeypatch, script, tmp_path, spoilt, says):
    """The run stops before the step and names the records of the batch; what was saved before stays."""
    script.main([*config(), "--optim.max_steps=1"])
    kept = (tmp_path / "out/checkpoints/step-1/model.safetensors").read_bytes()
    for loss in (DPO, BradleyTerry):
        real = loss.__call__
        monkeypatch.setattr(loss, "__call__", lambda self, inputs, real=real: spoilt(real(self, inputs)))
    with pytest.raises(RunStopped, match=rf"step 2: {says}, records \[.*\] of .*pairs.jsonl.gz"):
        script.main([*config(), "--run.save_every=1"])
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert checkpoint.name == "step-1" and (checkpoint / "model.safetensors").read_bytes() == kept


def test_spoilt_by_the_last_step(config, script, tmp_path):
    """Weights that the last step spoils are not saved: the held-out loss shows it, and the run stops."""
    with pytest.raises(RunStopped, match="step 1: held-out loss is nan; checkpoints in .* are from"):
        script.main([*config(), "--optim.max_steps=1", "--optim.lr=1e39"])
    assert not (tmp_path / "out" / "final").exists() and not (tmp_path / "out" / "checkpoints").exists()


def test_errors_of_a_gpu(config, monkeypatch, capsys, script):
    """One line names the keys to change; a bug keeps its traceback."""
    errors = [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore.")]
    errors += [TorchDynamoException("No valid triton configs.\nMore."), RuntimeError("a bug")]
    monkeypatch.setattr(sys, "argv", ["script", *config()])
    monkeypatch.setattr(step, "pack", Mock(side_effect=errors))
    for says, *keys in (
        ("CUDA out of memory", "optim.micro_tokens", "run.activation_checkpointing", "the same command"),
        ("No valid triton configs", "run.attention", "run.compile"),
    ):
        with pytest.raises(SystemExit) as left:
            exit_on_user_error(script.main)
        said = capsys.readouterr().err.splitlines()[-1]
        assert left.value.code == 1 and said.startswith(f"error: {says}") and all(key in said for key in keys)
    with pytest.raises(RuntimeError, match="a bug"):
        exit_on_user_error(script.main)


def test_ctrl_c_before_the_loop(config, monkeypatch, capsys):
    """In the reference's pass, Ctrl-C says what is saved and what the same command will do."""
    real = reference.all_logps
    arguments, press = config(optim__schedule='"constant"'), lambda *_: os.kill(os.getpid(), signal.SIGINT)
    for steps, says in (
        (2, "no checkpoint is saved yet; the same command starts anew"),
        (4, "the same command goes on after step 2"),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *arguments, f"--optim.max_steps={steps}"])
        monkeypatch.setattr(reference, "all_logps", press)
        with pytest.raises(SystemExit) as left:
            exit_on_user_error(train_dpo.main)
        assert left.value.code == STOPPED and capsys.readouterr().err.endswith(f"\ninterrupted: {says}\n")
        monkeypatch.setattr(reference, "all_logps", real)
        train_dpo.main(sys.argv[1:])


def test_closed_pipe(config, monkeypatch, tmp_path):
    """`train_dpo.py ... | head` stops as after Ctrl-C: what was trained is saved."""
    real = run_module.print0

    def closed(line: str) -> None:
        if line.startswith("step 2"):
            raise BrokenPipeError
        real(line)

    monkeypatch.setattr(run_module, "print0", closed)
    monkeypatch.setattr(run_module, "silence_closed_pipes", lambda: None)
    with pytest.raises(SystemExit) as left:
        train_dpo.main(config())
    assert left.value.code == STOPPED and (tmp_path / "out/checkpoints/step-2/state.json").is_file()


@pytest.mark.parametrize(("dtype", "slowdown"), [("fp32", 1.0), ("fp32", 7.0), ("bf16", 7.0)])
def test_slow_cpu(config, monkeypatch, capsys, dtype, slowdown):
    """Where a CPU is slow in bf16, or with all its threads, a run says what to do; the threads stay set."""

    def products_per_second(kind=torch.float32):
        alone = slowdown if torch.get_num_threads() == 1 else 1.0
        return alone if kind == torch.float32 else alone / slowdown

    monkeypatch.setattr(device, "products_per_second", products_per_second)
    before = torch.get_num_threads()
    train_dpo.main(config(optim__max_steps=1, run__dtype=f'"{dtype}"', run__threads=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(before)
    said = capsys.readouterr().out
    assert threads == 2 and said.count("7 times slower than on one thread") == (slowdown > 2)
    assert said.count("bf16 is 7 times slower than float32") == (dtype == "bf16")


@pytest.mark.parametrize(("ranks", "restored"), [(1, True), (2, False)])
def test_signals_after_an_error(config, monkeypatch, capfd, ranks, restored):
    """SIGTERM from torchrun does not cut off the line that tells the error of one of several processes."""
    run = run_module.Run(load_config(DPOConfig, config()))
    monkeypatch.setattr(run_module, "ranks", lambda: ranks)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(RuntimeError), run.stop_on_signals():
            raise RuntimeError("Connection closed by peer")
        assert (signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]) == restored
        if not restored:
            os.kill(os.getpid(), signal.SIGTERM)
            assert capfd.readouterr().err == ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
