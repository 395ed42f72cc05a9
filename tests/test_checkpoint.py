"""Checkpoints under a kill, a full disk, a read-only directory and a torn file: the last good one is never lost."""

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from minidpo.checkpoint import resume, save_checkpoint, save_final
from minidpo.errors import UserError
from minidpo.files import clear_leftovers
from minidpo.optim import AdamW
from minidpo.sections import OptimSection
from tiny import forked, small_files, tiny_model

IDENTITY = {"loss.name": "dpo", "run.seed": 0}


class Run:
    """A model, its optimizer and a place for their checkpoints; `save` takes a step of its own first."""

    def __init__(self, out: Path, seed: int = 0) -> None:
        self.out, self.model = out, tiny_model(seed)
        self.optimizer = AdamW(self.model, OptimSection(lr=1e-2))

    def save(self, step: int, keep: int = 1) -> Path:
        for parameter in self.model.parameters():
            parameter.grad = torch.full_like(parameter, float(step))
        self.optimizer.step()
        return save_checkpoint(self.out, step, self.model, self.optimizer, IDENTITY, keep, self.out, None)

    def resume(self, keep: int = 1) -> int:
        return resume(self.out, self.model, self.optimizer, IDENTITY, keep)

    def names(self) -> set[str]:
        return {path.name for path in (self.out / "checkpoints").iterdir()}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


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
def test_a_torn_newest_checkpoint_is_said_in_one_line_and_the_one_before_is_used(run, spoil, capsys):
    run.save(1, keep=2)
    good = [p.detach().clone() for p in run.model.parameters()]
    spoil(run.save(2, keep=2))
    again = Run(run.out, seed=1)
    assert again.resume() == 1
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), good, strict=True))
    torn, used = capsys.readouterr().out.splitlines()
    assert "step-2: not a whole checkpoint (" in torn and used.endswith("step-1")


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew_unasked(run):
    (run.save(1) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint in it is whole; remove it to start anew"):
        run.resume()


def test_another_run_is_refused_though_an_older_checkpoint_would_fit(run):
    run.save(1, keep=2)
    (run.save(2, keep=2) / "state.json").write_text(json.dumps({"step": 2, "identity": {"run.seed": 0}}))
    with pytest.raises(UserError, match="step-2 is of another script, .* loss.name is a setting of one"):
        run.resume()


def test_a_good_checkpoint_is_kept_beside_a_torn_later_one_until_a_better_one_is_whole(run):
    run.save(1, keep=3)
    (run.save(5, keep=3) / "state.json").unlink()
    Run(run.out).resume()
    run.save(2)
    assert run.names() == {"step-2", "step-5"}  # by number alone the torn one would be the one to keep
    assert Run(run.out).resume() == 2
    run.save(5)
    assert run.names() == {"step-5"} and Run(run.out).resume() == 5


def test_what_a_kill_between_a_save_and_its_clearing_left_goes_when_the_run_is_taken_up(run):
    for step in (1, 2, 3):
        run.save(step, keep=3)
    assert Run(run.out).resume(keep=1) == 3 and len(run.names()) == 3, "kept on purpose, by another setting"
    assert Run(run.out).resume(keep=2) == 3 and run.names() == {"step-2", "step-3"}


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(run):
    run.save(1)
    saved = {p.name: p.read_bytes() for p in (run.out / "checkpoints" / "step-1").iterdir()}
    for limit in (0, 100, 5000, 60_000):  # before, in and after the header, and in the optimizer's file
        with (
            small_files(limit),
            pytest.raises(UserError, match=r"step-2: cannot be written \(.*File too large"),
        ):
            run.save(2)
    with small_files(100), pytest.raises(UserError, match=r"final: cannot be written \("):
        save_final(run.out, run.model, run.out, None)
    assert {p.name: p.read_bytes() for p in (run.out / "checkpoints" / "step-1").iterdir()} == saved
    assert run.names() == {"step-1"} and not (run.out / "final").exists()
    assert run.save(2).is_dir() and run.names() == {"step-2"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_disk_that_fills_is_one_line_and_leaves_the_checkpoint_before(tmp_path):
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("no permission to mount")
    try:
        run = Run(tmp_path)
        run.save(1)
        with pytest.raises(UserError, match="step-2: cannot be written .*No space left on device"):
            run.save(2)
        assert run.names() == {"step-1"} and Run(tmp_path, seed=1).resume() == 1
    finally:
        os.system(f"umount {tmp_path}")


def test_a_directory_that_may_not_be_written_is_one_line():
    out = Path(tempfile.mkdtemp())
    run = Run(out)
    run.save(1)
    (out / "checkpoints").chmod(0o555)
    out.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nobody: root may write everywhere
    try:
        with pytest.raises(UserError, match=r"step-2: cannot be written \(Permission denied\)"):
            run.save(2)
    finally:
        os.seteuid(user)
        (out / "checkpoints").chmod(0o755)
        out.chmod(0o755)
    assert run.names() == {"step-1"} and Run(out, seed=1).resume() == 1
    shutil.rmtree(out)


@pytest.mark.parametrize("at", ["replace", "rmtree", "_exchange", "_sync"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_a_save_killed_at_any_call_leaves_a_whole_checkpoint_under_its_name(run, at, nth, swaps):
    """The same step saved over itself, keep = 1: the case in which the only checkpoint is replaced."""
    run.save(1)
    before = [p.detach().clone() for p in run.model.parameters()]

    def save_and_die() -> None:
        from minidpo import files

        if not swaps:
            files._exchange = lambda one, other: False
        owner = {"replace": files.os, "rmtree": files.shutil}.get(at, files)
        real, calls = getattr(owner, at), iter(range(1, 100))

        def die(*arguments, **options):
            if next(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(owner, at, die)
        run.save(1)

    forked(save_and_die)
    if swaps:
        assert (run.out / "checkpoints" / "step-1").is_dir()
    clear_leftovers(run.out / "checkpoints")
    assert run.names() == {"step-1"}
    again = Run(run.out, seed=1)
    assert again.resume() == 1
    run.optimizer.step()  # as the child did before it saved
    old = all(torch.equal(a, b) for a, b in zip(again.model.parameters(), before, strict=True))
    assert old or equal(again.model, run.model)


def test_a_deletion_that_is_killed_leaves_no_half_checkpoint(run):
    run.save(1)

    def save_and_die() -> None:
        def die_half_way(path: Path, ignore_errors: bool = False) -> None:
            if (path / "state.json").exists():
                (path / "state.json").unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree = die_half_way
        run.save(2)

    assert forked(save_and_die) == -signal.SIGKILL
    clear_leftovers(run.out / "checkpoints")
    assert run.names() == {"step-2"}
