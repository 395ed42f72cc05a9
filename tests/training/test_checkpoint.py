"""Under a kill, a full disk, a read-only directory or a torn file the last good checkpoint is never lost."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from minidpo import files
from minidpo.errors import UserError
from minidpo.files import clear_leftovers
from minidpo.sections import OptimSection
from minidpo.training.checkpoint import Checkpoints, run_identity
from minidpo.training.optim import adamw
from tiny import forked, small_files, tiny_model


class Run:
    """A model, its optimizer and a place for their checkpoints; `save` takes a step of its own first."""

    def __init__(self, out: Path, seed: int = 0) -> None:
        self.out, self.model = out, tiny_model(seed)
        self.identity = {"loss.name": "dpo", "run.seed": 0}
        self.optimizer = adamw(self.model, OptimSection(lr=1e-2))

    def checkpoints(self, keep: int = 1) -> Checkpoints:
        return Checkpoints(self.out, self.identity, keep, tokenizer_from=self.out, template=None)

    def save(self, step: int, keep: int = 1) -> Path:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, float(step))
        self.optimizer.step()
        return self.checkpoints(keep).save(step, self.model, self.optimizer)

    def resume(self, keep: int = 1) -> int:
        return self.checkpoints(keep).resume(self.model, self.optimizer)

    def names(self) -> set[str]:
        return {path.name for path in (self.out / "checkpoints").iterdir()}

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


SPOILS = {
    "weights cut short": lambda d: os.truncate(d / "model.safetensors", 5000),
    "no optimizer": lambda d: (d / "optimizer.safetensors").unlink(),
    "state cut short": lambda d: os.truncate(d / "state.json", 10),
    "state of a list": lambda d: (d / "state.json").write_text("[]"),
    "identity of a number": lambda d: (d / "state.json").write_text('{"step": 2, "identity": 3}'),
    "state nested without end": lambda d: (d / "state.json").write_text("[" * 100_000),
    "another step's state": lambda d: (d / "state.json").write_text(json.dumps({"step": 1, "identity": {}})),
    "tensors of another model": lambda d: shutil.copy(d / "model.safetensors", d / "optimizer.safetensors"),
    "empty": lambda d: [file.unlink() for file in d.iterdir()],
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_torn_newest_checkpoint(run, spoil, capsys):
    """It is told in one line, and the one before is used."""
    run.save(1, keep=2)
    good = run.weights()
    spoil(run.save(2, keep=2))
    again = Run(run.out, seed=1)
    assert again.resume() == 1
    assert torch.equal(again.weights(), good)
    torn, used = capsys.readouterr().out.splitlines()
    assert "step-2: not a whole checkpoint (" in torn and used.endswith("step-1")


def test_no_whole_checkpoint(run):
    """The run does not begin anew unasked."""
    (run.save(1) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint in it is whole; remove it to start anew"):
        run.resume()


DPO = {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0, "length_normalize": False}
CHANGES = {
    "another beta": ({"loss": DPO | {"beta": 0.2}}, "loss.beta = 0.1, now it is 0.2"),
    # Another loss has other settings too, and is told by its name all the same.
    "another loss": ({"loss": {"name": "sft"}}, "loss.name = 'dpo', now it is 'sft'"),
    "another seed": ({"run": {"seed": 1, "dtype": "fp32"}}, "run.seed = 0, now it is 1"),
    "older version": ({"loss": DPO | {"gamma": 1.0}, "data": "other"}, "loss.gamma = None, now it is 1.0"),
    "another script": ({"loss": {"lm_weight": 1.0}}, "loss.name = 'dpo', now it is None"),
    "other data": ({"data": "other"}, "data = 'digest', now it is 'other'"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES.keys())
def test_checkpoint_of_another_run_is_refused_in_one_line(run, change, said):
    """Even if an older one would fit. A run's length may change; what else changes its numbers is named."""
    config = {
        "loss": DPO,
        "optim": {"lr": 1e-2, "epochs": 1.0},
        "run": {"seed": 0, "dtype": "fp32", "out": "a"},
    }
    run.identity = run_identity(config | change, {"data": change.get("data", "digest")})
    run.save(1, keep=2)
    run.identity = run_identity(config, {"data": "digest"})
    run.save(2, keep=2)
    run.identity = run_identity(config | {"optim": {"lr": 1e-2, "epochs": 2.0}}, {"data": "digest"})
    assert run.resume() == 2
    run.identity = run_identity(config | change, {"data": change.get("data", "digest")})
    with pytest.raises(UserError) as error:
        run.resume()
    hint = "give the run another run.out, or the old settings, files and version"
    assert str(error.value) == f"{run.out}/checkpoints/step-2 was made with {said}; {hint}"


def test_good_checkpoint_beside_a_torn_later_one(run):
    """The good one is kept until a better one is complete."""
    run.save(1, keep=3)
    (run.save(5, keep=3) / "state.json").unlink()
    Run(run.out).resume()
    run.save(2)
    assert run.names() == {"step-2", "step-5"}  # by number alone the torn one would be the one to keep
    assert Run(run.out).resume() == 2
    run.save(5)
    assert run.names() == {"step-5"} and Run(run.out).resume() == 5


def test_kill_between_save_and_removal(run):
    """The one checkpoint too many goes when the run resumes; more than one were kept by another setting."""
    for step in (1, 2, 3):
        run.save(step, keep=3)
    assert Run(run.out).resume(keep=1) == 3 and len(run.names()) == 3, "kept on purpose, by another setting"
    assert Run(run.out).resume(keep=2) == 3 and run.names() == {"step-2", "step-3"}


def still_good(run: Run) -> bool:
    """Whether the only checkpoint is that of step 1, and whole."""
    return run.names() == {"step-1"} and Run(run.out, seed=1).resume() == 1


@pytest.mark.parametrize("limit", [0, 100, 5000, 60_000])
def test_full_disk(run, limit):
    """One line, and the checkpoint before stays; before, in and after the header, in the optimizer's file."""
    run.save(1)
    with small_files(limit), pytest.raises(UserError, match=r"step-2: cannot be written \(.*File too large"):
        run.save(2)
    with small_files(limit), pytest.raises(UserError, match=r"final: cannot be written \("):
        run.checkpoints().save_final(run.model)
    assert still_good(run) and not (run.out / "final").exists()
    assert run.save(2).is_dir() and run.names() == {"step-2"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_small_disk_that_fills(tmp_path):
    """It is told in one line, and the checkpoint before stays."""
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("no permission to mount")
    try:
        run = Run(tmp_path)
        run.save(1)
        with pytest.raises(UserError, match="step-2: cannot be written .*No space left on device"):
            run.save(2)
        assert still_good(run)
    finally:
        os.system(f"umount {tmp_path}")


def test_read_only_directory():
    """It is told in one line, and the checkpoint before stays."""
    run = Run(Path(tempfile.mkdtemp()))
    run.save(1)
    places, user = (run.out / "checkpoints", run.out), os.geteuid()
    for place in places:
        place.chmod(0o555)
    if user == 0:
        os.seteuid(65534)  # nobody: root may write everywhere
    try:
        with pytest.raises(UserError, match=r"step-2: cannot be written \(Permission denied\)"):
            run.save(2)
    finally:
        os.seteuid(user)
        for place in places:
            place.chmod(0o755)
    assert still_good(run)
    shutil.rmtree(run.out)


def killed(run: Run, step: int, at: str, nth: int) -> None:
    """Save in a child process that is killed when it comes to the nth call of a function."""

    def save_and_die() -> None:
        owner = {"replace": files.os, "rmtree": files.shutil}.get(at, files)
        real, calls = getattr(owner, at), iter(range(1, 100))

        def die(path: Path, *arguments, **options):
            if next(calls) == nth:
                if at == "rmtree" and path.exists():
                    next(file for file in path.iterdir()).unlink()  # half-way
                os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *arguments, **options)

        setattr(owner, at, die)
        run.save(step)

    assert forked(save_and_die) == -signal.SIGKILL
    clear_leftovers(run.out / "checkpoints")


CALLS = {"replace": 5, "rmtree": 3, "_sync": 9}


@pytest.mark.parametrize(("at", "nth"), [(at, n + 1) for at, calls in CALLS.items() for n in range(calls)])
def test_save_killed_at_any_call(run, at, nth):
    """The same step saved over itself, so that the only checkpoint is replaced: old or new, one is whole."""
    run.save(1)
    old = run.weights()
    killed(run, 1, at, nth)
    assert run.names() == {"step-1"}
    again = Run(run.out, seed=1)
    assert again.resume() == 1
    run.optimizer.step()  # as the child did before it saved
    assert any(torch.equal(again.weights(), weights) for weights in (old, run.weights()))


def test_a_deletion_that_is_killed_leaves_no_half_checkpoint(run):
    run.save(1)
    killed(run, 2, "rmtree", nth=4)  # after the three of the save, that of the checkpoint before
    assert run.names() == {"step-2"}
