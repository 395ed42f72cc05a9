"""What stops a run: numbers that are not finite, memory that runs out, signals. Each in one line that says what to do."""

import os
import signal
import sys

import pytest
import torch

import train_dpo
import train_rm
from minidpo.errors import RunStopped, exit_on_user_error
from minidpo.losses import DPO, BradleyTerry
from minidpo.training import run as run_module
from minidpo.training import step
from minidpo.training.run import Run

SCRIPTS = pytest.mark.parametrize(
    ("script", "loss"), [(train_dpo, DPO), (train_rm, BradleyTerry)], ids=["dpo", "rm"]
)


@SCRIPTS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(config, monkeypatch, script, loss, value, tmp_path):
    """The run stops, though the gradient is finite, and names the records of the batch and their file."""
    real, calls = loss.__call__, iter(range(1, 1000))

    def spoilt(self, inputs):
        losses = real(self, inputs)
        spoils = torch.zeros_like(losses)
        # From the third call on, which comes after the evaluation and one step. It adds no gradient.
        spoils[0] = value if next(calls) >= 3 else 0.0
        return losses + spoils

    monkeypatch.setattr(loss, "__call__", spoilt)
    with pytest.raises(RunStopped, match=rf"step 2: loss is {value}, records \[.*\] of .*pairs.jsonl.gz"):
        script.main([*config(), "--run.save_every=1", "--optim.micro_tokens=4096"])
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-1"]


@SCRIPTS
def test_a_gradient_that_is_not_finite(config, monkeypatch, script, loss):
    """The loss may be finite: log(0) has a value nowhere, but sqrt(0) has one, and no slope."""
    real = loss.__call__

    def spoilt(self, inputs):
        losses = real(self, inputs)
        return losses + (losses - losses.detach()).abs().sqrt()

    monkeypatch.setattr(loss, "__call__", spoilt)
    with pytest.raises(RunStopped, match=r"step 1: gradient norm is nan, records \["):
        script.main(config())


@SCRIPTS
def test_out_of_memory(config, monkeypatch, capsys, script, loss, tmp_path):
    """One line names the keys to change, and the same command with another micro_tokens goes on."""
    real, passes = step.pack, iter(range(1, 1000))

    def small_memory(*arguments, **more):
        if torch.is_grad_enabled() and next(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return real(*arguments, **more)

    arguments = [*config(), "--run.save_every=1"]
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(step, "pack", small_memory)
        exit_on_user_error(script.main)
    said = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 1 and said.startswith("error: CUDA out of memory")
    assert "optim.micro_tokens" in said and "run.activation_checkpointing" in said
    script.main([*arguments, "--optim.micro_tokens=100"])
    assert "resuming from" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(monkeypatch):
    def main(arguments: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(RuntimeError, match="a bug"):
        exit_on_user_error(main)


@pytest.mark.parametrize("ranks, restored", [(1, True), (2, False)])
def test_signals_after_an_error(monkeypatch, capfd, ranks, restored):
    """SIGTERM from torchrun does not cut off the line that tells the error of one of several processes."""
    monkeypatch.setattr(run_module, "ranks", lambda: ranks)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run = object.__new__(Run)
    run._stop_requested = False
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
