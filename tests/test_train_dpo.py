"""train_dpo.py as a whole, on files: what it must get right from the first step to the resumed last one."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_dpo
from minidpo import objective
from minidpo.errors import RunStopped, UserError
from minidpo.weights import load_model


def run(arguments: list[str], *overrides: str) -> list[dict]:
    train_dpo.main([*arguments, *overrides])
    out = next((o.partition("=")[2] for o in overrides if o.startswith("--run.out")), None)
    out = Path(out) if out else Path(arguments[0]).parent / "out"
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(metrics: list[dict]) -> list[dict]:
    return [m for m in metrics if "loss" in m]


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


@pytest.mark.parametrize(
    ("loss", "first"), [("dpo", math.log(2)), ("ipo", 25.0), ("dpo --loss.label_smoothing=0.2", math.log(2))]
)
def test_the_first_loss_is_the_closed_form_value_while_policy_equals_reference(config, loss, first):
    name, *more = loss.split()
    metrics = run(config(), f"--loss.name={name}", *more)
    before, step = metrics[0], metrics[1]
    assert before["eval/loss"] == pytest.approx(first, abs=1e-6)
    assert step["loss"] == pytest.approx(first, abs=1e-6)
    assert step["rewards/margins"] == step["rewards/accuracies"] == 0.0


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "sft"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_lowers_the_held_out_loss(config, name, dtype):
    # chosen endings are short here and rejected ones long: learnable from any prompt
    metrics = run(config(), f"--loss.name={name}", f"--run.dtype={dtype}", "--optim.max_steps=8")
    evals = [m["eval/loss"] for m in metrics if "eval/loss" in m]
    assert len(evals) == 2
    assert evals[1] < evals[0]


def test_metrics_have_the_agreed_names(config):
    step, evaluation = run(config())[1], run(config())[0]
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    names |= {"loss", "logps/rejected", "response_length/chosen", "response_length/rejected", "idle"}
    assert step.keys() == names | {"step", "epoch", "lr", "grad_norm", "tokens_per_s"}
    assert evaluation.keys() == {"step"} | {f"eval/{name}" for name in names}


def test_micro_tokens_change_nothing_but_rounding(config, tmp_path):
    whole = run(config(optim__micro_tokens=4096), f"--run.out={tmp_path / 'whole'}")
    cut = run(config(optim__micro_tokens=80), f"--run.out={tmp_path / 'cut'}")
    for a, b in zip(steps(whole), steps(cut), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_live_reference_gives_the_same_losses_as_a_stored_one(config, world, tmp_path):
    other = f"--reference.path={world / 'other'}"
    stored = run(config(), other, f"--run.out={tmp_path / 'stored'}")
    live = run(config(), other, "--reference.precompute=false", f"--run.out={tmp_path / 'live'}")
    assert stored[1]["rewards/margins"] != 0.0
    for a, b in zip(stored, live, strict=True):
        for name in ("loss", "eval/loss", "rewards/chosen"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4)


@pytest.mark.parametrize("name", ["dpo", "simpo", "sft"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, tmp_path, name):
    settings = config(optim__max_steps=6, optim__schedule='"constant"')
    at_once = run(settings, f"--loss.name={name}", f"--run.out={tmp_path / 'once'}")
    in_two = f"--run.out={tmp_path / 'twice'}"
    run(settings, f"--loss.name={name}", in_two, "--optim.max_steps=3")
    resumed = run(settings, f"--loss.name={name}", in_two)
    for key, value in final(tmp_path / "once").items():
        assert torch.equal(value, final(tmp_path / "twice")[key]), key
    assert [m["loss"] for m in steps(at_once)] == [m["loss"] for m in steps(resumed)]


def test_a_run_stopped_by_sigint_saves_and_goes_on_to_the_same_weights(config, tmp_path, monkeypatch, capsys):
    run(config(), f"--run.out={tmp_path / 'once'}")
    import os
    import signal

    real = train_dpo.batch_rows

    def interrupted(step, *rest):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, *rest)

    monkeypatch.setattr(train_dpo, "batch_rows", interrupted)
    run(config(), f"--run.out={tmp_path / 'twice'}")
    assert "stopped after step 2" in capsys.readouterr().out
    assert not (tmp_path / "twice" / "final").exists()
    monkeypatch.setattr(train_dpo, "batch_rows", real)
    run(config(), f"--run.out={tmp_path / 'twice'}")
    for key, value in final(tmp_path / "once").items():
        assert torch.equal(value, final(tmp_path / "twice")[key]), key


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


def test_a_first_start_killed_before_any_checkpoint_leaves_no_line_twice(config, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dpo, "batch_rows", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            run(config())
    assert [m["step"] for m in run(config())] == [0, 1, 2, 3, 4, 4]


def test_the_epoch_of_the_last_step_is_what_was_asked_for_though_its_batch_is_short(config):
    metrics = run(config(), "--optim.batch_size=20", "--optim.max_steps=0")
    assert steps(metrics)[-1]["epoch"] == 1.0


def test_a_loss_without_a_reference_says_that_it_does_not_read_one(config, world, capsys):
    run(config(), "--loss.name=simpo", f"--reference.path={world / 'other'}")
    assert "simpo has no reference" in capsys.readouterr().out


def test_a_reference_that_cannot_take_the_texts_is_refused(config, world, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(world / "other", short)
    fields = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 32}))
    with pytest.raises(UserError, match="up to 64 tokens .* the reference takes 32"):
        run(config(), f"--reference.path={short}")


@pytest.mark.parametrize("override", ["--loss.beta=0.2", "--optim.lr=2e-3", "--data.max_length=48"])
def test_resuming_as_another_run_is_refused_with_the_name_of_what_differs(config, override):
    run(config())
    changed = "data" if "data" in override else override[2:].partition("=")[0]
    with pytest.raises(UserError, match=f"{changed} = "):
        run(config(), override)


def test_a_reference_swapped_under_a_run_is_refused(config, world):
    run(config())
    with pytest.raises(UserError, match="reference = "):
        run(config(), f"--reference.path={world / 'other'}")


def test_stored_reference_logps_are_reused_only_for_the_same_reference_data_and_precision(
    config, capsys, tmp_path
):
    def out(*overrides: str) -> str:
        import shutil

        shutil.rmtree(tmp_path / "out" / "checkpoints", ignore_errors=True)
        run(config(), *overrides)
        return capsys.readouterr().out

    assert "read from" not in out()
    assert "read from" in out()
    assert "read from" not in out("--run.dtype=bf16")
    assert "read from" not in out("--run.dtype=bf16", "--data.max_length=48")
    (tmp_path / "out" / "reference.safetensors").write_bytes(b"torn")
    assert "is torn" in out("--run.dtype=bf16", "--data.max_length=48")


def test_a_non_finite_gradient_stops_the_run_and_keeps_the_checkpoint(config, monkeypatch, tmp_path):
    run(config(), "--optim.max_steps=2")
    kept = (tmp_path / "out" / "checkpoints" / "step-2" / "model.safetensors").read_bytes()
    real = objective.dpo_loss
    monkeypatch.setattr(
        objective, "dpo_loss", lambda *a: real(*a)._replace(losses=real(*a).losses * float("nan"))
    )
    with pytest.raises(RunStopped, match=r"step 3: loss is nan, records \["):
        run(config(), "--optim.max_steps=4")
    assert (tmp_path / "out" / "checkpoints" / "step-2" / "model.safetensors").read_bytes() == kept


def test_final_opens_as_a_model_with_its_tokenizer(config, tmp_path):
    run(config())
    assert (tmp_path / "out" / "final" / "tokenizer.json").is_file()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").eval()
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out" / "final")(tokens), theirs(tokens).logits)


def test_master_weights_move_at_rates_that_bf16_could_not_hold(config, world, tmp_path):
    run(config(run__dtype='"bf16"'), "--optim.lr=1e-6")
    before, after = load_file(world / "model" / "model.safetensors"), final(tmp_path / "out")
    moved = [(before[k] != after[k]).float().mean().item() for k in before if "proj" in k]
    assert min(moved) > 0.9
    assert all(v.dtype == torch.float32 for v in after.values())


def test_activation_checkpointing_changes_nothing(config, tmp_path):
    plain = run(config(), f"--run.out={tmp_path / 'plain'}")
    again = run(config(), "--run.activation_checkpointing=true", f"--run.out={tmp_path / 'again'}")
    for a, b in zip(steps(plain), steps(again), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_only_keep_checkpoints_newest_remain(config, tmp_path):
    run(config(), "--run.save_every=1", "--run.keep_checkpoints=2")
    assert {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()} == {"step-3", "step-4"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--data.max_length=512", "the model takes 256"),
        ("--optim.micro_tokens=20", "one pair has"),
        ("--data.eval_pairs=40", "hold out of 40"),
        ("--model.path=nowhere", "nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(config, tmp_path, override, says):
    with pytest.raises(UserError, match=says):
        run(config(), override)
    assert not (tmp_path / "out").exists()


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
