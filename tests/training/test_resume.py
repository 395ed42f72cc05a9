"""A run that ended early goes on as if it had not, and no other run goes on in its place."""

import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

from minidpo.data import PairOrder
from minidpo.errors import UserError
from minidpo.training import reference
from minidpo.training.checkpoint import Checkpoints
from minidpo.training.run import Run
from runs import final, steps
from runs import run_dpo as run


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "sft"])
def test_ctrl_c_and_resume(name, config, tmp_path, monkeypatch, capfd):
    """A run stopped by SIGINT saves, and the same command goes on to the same weights, bit for bit."""
    real, settings = PairOrder.__getitem__, config()
    at_once = run(settings, f"--loss.name={name}", f"--run.out={tmp_path / 'once'}")

    def interrupted(order, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(order, step)

    in_two = f"--run.out={tmp_path / 'twice'}"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(PairOrder, "__getitem__", interrupted)
        run(settings, f"--loss.name={name}", in_two)
    assert stop.value.code == 130  # the status that shells give Ctrl-C: `train && publish` stops too
    said = capfd.readouterr()
    assert "stopped after step 2" in said.out and "Ctrl-C again stops at once" in said.err
    assert not (tmp_path / "twice" / "final").exists()
    resumed = run(settings, f"--loss.name={name}", in_two)
    for key, value in final(tmp_path / "once").items():
        assert torch.equal(value, final(tmp_path / "twice")[key]), key
    assert [m["loss"] for m in steps(at_once)] == [m["loss"] for m in steps(resumed)]


def test_ctrl_c_before_the_first_step(config, tmp_path, monkeypatch, capfd):
    """It saves what there is, and the same command goes on to the same weights."""
    run(config(), f"--run.out={tmp_path / 'once'}")
    real = Run.stop_requested

    def interrupted(self):
        os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Run, "stop_requested", interrupted)
        run(config())
    assert stop.value.code == 130 and "stopped after step 0" in capfd.readouterr().out
    run(config())
    once, twice = final(tmp_path / "once"), final(tmp_path / "out")
    assert all(torch.equal(once[key], twice[key]) for key in once)


def test_ctrl_c_in_the_last_step(config, monkeypatch, tmp_path):
    real = PairOrder.__getitem__

    def interrupted(order, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(order, step)

    monkeypatch.setattr(PairOrder, "__getitem__", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(config())
    assert stop.value.code == 130 and (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_more_steps_need_more_of_the_reference(config, tmp_path, monkeypatch):
    """The reference is computed for the pairs that a run draws; with more steps they are more, and computed anew."""
    computed = []
    real = reference.all_logps

    def all_logps(model, pairs, *rest):
        computed.append(len(pairs))
        return real(model, pairs, *rest)

    monkeypatch.setattr(reference, "all_logps", all_logps)
    arguments = config(optim__batch_size=2, optim__epochs=1, optim__max_steps=3, data__eval_pairs=4)
    run(arguments)
    assert computed == [6, 4]
    for _ in range(2):
        run(arguments, "--optim.max_steps=5")
        assert computed == [6, 4, 10]
    run(arguments, "--optim.max_steps=5", f"--run.out={tmp_path / 'at_once'}")
    grown, at_once = (load_file(tmp_path / out / "reference.safetensors") for out in ("out", "at_once"))
    for name in ("train", "held_out"):
        torch.testing.assert_close(grown[name], at_once[name], equal_nan=True)
        assert grown[name].isnan().any() == (name == "train")


def test_the_same_command_after_the_end(config, tmp_path, capsys):
    run(config())
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    run(config())
    assert "nothing left to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before


def test_killed_before_final(config, tmp_path):
    run(config(), f"--run.out={tmp_path / 'whole'}")
    run(config(), "--optim.max_steps=2")  # leaves a final/ of step 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save_final", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(config())
    run(config())
    left, right = final(tmp_path / "out"), load_file(tmp_path / "out/checkpoints/step-4/model.safetensors")
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_killed_while_final_is_saved(config, monkeypatch, tmp_path):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save_final", die)
        run(config(), "--run.save_every=1")
    run(config(), "--run.save_every=1")
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_killed_before_any_checkpoint(config, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairOrder, "__getitem__", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(config())
    assert [m["step"] for m in run(config())] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    "override", ["--loss.beta=0.2", "--optim.lr=2e-3", "--data.max_length=48", "--loss.name=simpo"]
)
def test_another_run_is_refused(config, override):
    run(config())
    name, value = override[2:].split("=")
    said = (
        "data = '" if name.startswith("data") else f"{name} = .*now it is '?{value.replace('2e-3', '0.002')}"
    )
    with pytest.raises(UserError, match=f"was made with {said}"):
        run(config(), override)


def test_a_reference_swapped_under_a_run_is_refused(config, world):
    run(config())
    with pytest.raises(UserError, match="was made with reference = "):
        run(config(), f"--reference.path={world / 'other'}")


def test_only_keep_checkpoints_newest_remain(config, tmp_path):
    run(config(), "--run.save_every=1", "--run.keep_checkpoints=2")
    assert {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()} == {"step-3", "step-4"}
