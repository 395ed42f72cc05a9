"""Under a kill, a full disk, a read-only directory or a torn file the last good checkpoint is never lost."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidpo import files
from minidpo.errors import UserError
from minidpo.files import clear_leftovers
from minidpo.sections import DPOConfig, OptimSection, RunSection
from minidpo.training.checkpoint import Checkpoints
from minidpo.training.optim import adamw
from tiny import forked, small_files, tiny_model


class Run:
    """A model, its optimizer and a place for their checkpoints; `save` takes a step of its own first."""

    def __init__(self, out: Path, seed: int = 0) -> None:
        self.out, self.model = out, tiny_model(seed)
        self.optimizer = adamw(self.model, OptimSection(lr=1e-2))

    def checkpoints(self, keep: int = 1) -> Checkpoints:
        config = DPOConfig(run=RunSection(out=str(self.out), keep_checkpoints=keep))
        return Checkpoints(config, {"run.seed": 0}, steps=9, files={})

    def save(self, step: int, keep: int = 1) -> Path:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, float(step))
        self.optimizer.step()
        return self.checkpoints(keep).save(step, self.model, self.optimizer)

    def resume(self, keep: int = 1) -> int:
        return self.checkpoints(keep).resume(self.model, self.optimizer)

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.out / "checkpoints").iterdir())

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def with_nan(file: Path, name: str) -> None:
    tensors = load_file(file)
    next(tensor for key, tensor in tensors.items() if key.endswith(name)).flatten()[0] = float("nan")
    save_file(tensors, file)


SPOILS = {
    "weights cut short": lambda d: os.truncate(d / "model.safetensors", 5000),
    "no optimizer": lambda d: (d / "optimizer.safetensors").unlink(),
    "state of a list": lambda d: (d / "state.json").write_text("[]"),
    "identity of a number": lambda d: (d / "state.json").write_text('{"step": 2, "identity": 3}'),
    "state nested without end": lambda d: (d / "state.json").write_text("[" * 100_000),
    "another step's state": lambda d: (d / "state.json").write_text('{"step": 1, "identity": {}}'),
    "tensors of another model": lambda d: shutil.copy(d / "model.safetensors", d / "optimizer.safetensors"),
    "moments that are not finite": lambda d: with_nan(d / "optimizer.safetensors", "exp_avg_sq"),
    "weights that are not finite": lambda d: with_nan(d / "model.safetensors", "norm.weight"),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_torn(run, spoil, capsys):
    """A torn newest checkpoint is told in one line, and the one before is used."""
    run.save(1, keep=2)
    good = run.weights()
    spoil(run.save(2, keep=2))
    again = Run(run.out, seed=1)
    assert again.resume() == 1 and torch.equal(again.weights(), good)
    torn, used = capsys.readouterr().out.splitlines()
    assert "step-2: not a whole checkpoint (" in torn and used.endswith("step-1")


def test_none_is_whole(run):
    """The run does not begin anew unasked."""
    (run.save(1) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint in it is whole; remove it to start anew"):
        run.resume()


def test_torn_later_one(run):
    """A good checkpoint is kept until a better one is whole; by number alone, a torn later one would stay."""
    run.save(1, keep=3)
    (run.save(5, keep=3) / "state.json").unlink()
    run.resume()
    run.save(2)
    assert run.names() == ["step-2", "step-5"] and Run(run.out).resume() == 2
    run.save(5)
    assert run.names() == ["step-5"] and Run(run.out).resume() == 5


def test_keep(run):
    """The newest ones are kept; one too many, which a kill between save and removal leaves, goes at a resume."""
    for step in (1, 2, 3, 4):
        run.save(step, keep=3)
    assert run.names() == ["step-2", "step-3", "step-4"]
    assert run.resume(keep=2) == 4 and run.names() == ["step-3", "step-4"]


@pytest.mark.parametrize("limit", [0, 100, 5000, 60_000])
def test_full_disk(run, limit):
    """One line, and the checkpoint before stays; before, in and after the header, in the optimizer's file."""
    run.save(1)
    with small_files(limit), pytest.raises(UserError, match=r"step-2: cannot be written \(.*File too large"):
        run.save(2)
    with small_files(limit), pytest.raises(UserError, match=r"final: cannot be written \("):
        run.checkpoints().save_final(run.model)
    assert run.names() == ["step-1"] and Run(run.out).resume() == 1 and not (run.out / "final").exists()
    run.save(2)
    assert run.names() == ["step-2"]


CALLS = [(1, files.os, "replace", n) for n in range(1, 6)] + [(1, files, "_sync", n) for n in range(1, 10)]
CALLS += [(step, files.shutil, "rmtree", 1) for step in (1, 2)]


@pytest.mark.parametrize(("step", "owner", "function", "nth"), CALLS)
def test_killed(run, step, owner, function, nth):
    """A save that is killed at the nth call of a function leaves one whole checkpoint: the old or the new
    one.

    Step 1 is saved over itself, so that the only checkpoint is replaced.
    """
    run.save(1)
    old, real, calls = run.weights(), getattr(owner, function), iter(range(1, 100))

    def die(path: Path, *arguments, **options):
        if next(calls) == nth:
            if function == "rmtree":
                next(path.iterdir()).unlink()  # half-way
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *arguments, **options)

    def save_and_die() -> None:
        setattr(owner, function, die)
        run.save(step)

    assert forked(save_and_die) == -signal.SIGKILL
    clear_leftovers(run.out / "checkpoints")
    assert run.names() == [f"step-{step}"]  # before a resume, which would clear up
    again = Run(run.out, seed=1)
    assert again.resume() == step
    run.save(step)  # as the child did
    assert any(torch.equal(again.weights(), weights) for weights in (old, run.weights()))
