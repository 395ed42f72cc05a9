"""A run that ended early goes on as if it had not, and no other run goes on in its place."""

import os
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_dpo
from minidpo import reference
from minidpo.errors import UserError
from runs import final, steps
from runs import run_dpo as run


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "sft"])
def test_a_run_stopped_by_sigint_saves_and_goes_on_to_the_same_weights(
    name, config, tmp_path, monkeypatch, capfd
):
    real, settings = train_dpo.batch_rows, config()
    at_once = run(settings, f"--loss.name={name}", f"--run.out={tmp_path / 'once'}")

    def interrupted(step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, *rest)

    in_two = f"--run.out={tmp_path / 'twice'}"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train_dpo, "batch_rows", interrupted)
        run(settings, f"--loss.name={name}", in_two)
    assert stop.value.code == 130  # as a shell says of Ctrl-C: `train && publish` stops too
    said = capfd.readouterr()
    assert "stopped after step 2" in said.out and "Ctrl-C again stops at once" in said.err
    assert not (tmp_path / "twice" / "final").exists()
    resumed = run(settings, f"--loss.name={name}", in_two)
    for key, value in final(tmp_path / "once").items():
        assert torch.equal(value, final(tmp_path / "twice")[key]), key
    assert [m["loss"] for m in steps(at_once)] == [m["loss"] for m in steps(resumed)]


def test_a_run_interrupted_in_its_last_step_ends_whole_but_as_interrupted(config, monkeypatch, tmp_path):
    real = train_dpo.batch_rows

    def interrupted(step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, *rest)

    monkeypatch.setattr(train_dpo, "batch_rows", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(config())
    assert stop.value.code == 130 and (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_a_run_asked_for_more_steps_computes_the_reference_of_the_further_pairs_alone(
    config, tmp_path, monkeypatch
):
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
        assert computed == [6, 4, 4]
    run(arguments, "--optim.max_steps=5", f"--run.out={tmp_path / 'at_once'}")
    grown, at_once = (load_file(tmp_path / out / "reference.safetensors") for out in ("out", "at_once"))
    for name in ("train", "held_out"):
        torch.testing.assert_close(grown[name], at_once[name], equal_nan=True)
        assert grown[name].isnan().any() == (name == "train")


def test_the_same_command_after_the_end_says_so_and_touches_nothing(config, tmp_path, capsys):
    run(config())
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    run(config())
    assert "nothing left to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before


def test_a_run_killed_between_its_last_checkpoint_and_final_is_finished_by_the_same_command(config, tmp_path):
    run(config(), f"--run.out={tmp_path / 'whole'}")
    run(config(), "--optim.max_steps=2")  # leaves a final/ of step 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "save_final", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(config())
    run(config())
    left, right = final(tmp_path / "out"), load_file(tmp_path / "out/checkpoints/step-4/model.safetensors")
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_run_that_dies_while_its_final_model_is_saved_saves_it_when_started_again(
    config, monkeypatch, tmp_path
):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_dpo, "save_final", die)
        run(config(), "--run.save_every=1")
    run(config(), "--run.save_every=1")
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


def test_a_first_start_killed_before_any_checkpoint_leaves_no_line_twice(config, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "batch_rows", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(config())
    assert [m["step"] for m in run(config())] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize(
    "override", ["--loss.beta=0.2", "--optim.lr=2e-3", "--data.max_length=48", "--loss.name=simpo"]
)
def test_resuming_as_another_run_is_refused_with_the_name_of_what_differs(config, override):
    run(config())
    changed = "another data: " if "data" in override else override[2:].replace("=", " = .*now it is '?")
    with pytest.raises(UserError, match=changed.replace("2e-3", "0.002")):
        run(config(), override)


def test_a_reference_swapped_under_a_run_is_refused(config, world):
    run(config())
    with pytest.raises(UserError, match="another reference"):
        run(config(), f"--reference.path={world / 'other'}")


def test_only_keep_checkpoints_newest_remain(config, tmp_path):
    run(config(), "--run.save_every=1", "--run.keep_checkpoints=2")
    assert {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()} == {"step-3", "step-4"}
