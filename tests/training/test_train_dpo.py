"""train_dpo.py as a whole, on files: what it must get right from the first step to the last."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from minidpo.errors import RunStopped, UserError
from minidpo.losses import DPO
from minidpo.model import load_model
from runs import final, steps
from runs import run_dpo as run


@pytest.mark.parametrize(
    ("loss", "first"), [("dpo", math.log(2)), ("ipo", 25.0), ("dpo --loss.label_smoothing=0.2", math.log(2))]
)
def test_first_loss(config, loss, first):
    """While policy equals reference, the loss is its closed form and every margin 0."""
    name, *more = loss.split()
    metrics = run(config(), f"--loss.name={name}", *more)
    before, step = metrics[0], metrics[1]
    assert before["eval/loss"] == pytest.approx(first, abs=1e-6)
    assert step["loss"] == pytest.approx(first, abs=1e-6)
    assert step["rewards/margins"] == step["rewards/accuracies"] == 0.0


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "sft"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_lowers_the_held_out_loss(config, name, dtype):
    # Chosen responses are short here and rejected ones long, which can be learnt from any prompt.
    metrics = run(config(), f"--loss.name={name}", f"--run.dtype={dtype}", "--optim.max_steps=8")
    evals = [m["eval/loss"] for m in metrics if "eval/loss" in m]
    assert len(evals) == 2
    assert evals[1] < evals[0]


def test_metrics_have_the_agreed_names(config):
    step, evaluation = run(config())[1], run(config())[0]
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    names |= {"loss", "logps/rejected", "response_length/chosen", "response_length/rejected", "saturated"}
    assert step.keys() == names | {"step", "epoch", "lr", "grad_norm", "tokens_per_s"}
    assert evaluation.keys() == {"step"} | {f"eval/{name}" for name in names}


def test_micro_tokens_change_nothing_but_rounding(config, tmp_path):
    whole = run(config(optim__micro_tokens=4096), f"--run.out={tmp_path / 'whole'}")
    cut = run(config(optim__micro_tokens=80), f"--run.out={tmp_path / 'cut'}")
    for a, b in zip(steps(whole), steps(cut), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_another_reference(config, world):
    """With another reference policy and reference differ from the start."""
    metrics = run(config(), f"--reference.path={world / 'other'}")
    assert metrics[1]["rewards/margins"] != 0.0 and metrics[1]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_epoch_of_the_last_step(config):
    """It is what was asked for, though the last batch is short."""
    metrics = run(config(), "--optim.batch_size=20", "--optim.max_steps=0")
    assert steps(metrics)[-1]["epoch"] == 1.0


def test_a_reference_that_is_not_read_is_told(config, world, capsys):
    run(config(), "--loss.name=simpo", f"--reference.path={world / 'other'}")
    assert "simpo has no reference" in capsys.readouterr().out


def test_a_short_reference_is_refused(config, world, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(world / "other", short)
    fields = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 32}))
    with pytest.raises(UserError, match="up to 64 tokens .* the reference takes 32"):
        run(config(), f"--reference.path={short}")


def test_stored_reference_logps(config, capsys, tmp_path):
    """They are read again only for the same reference, data and precision."""

    def out(*overrides: str) -> str:
        shutil.rmtree(tmp_path / "out" / "checkpoints", ignore_errors=True)
        run(config(), *overrides)
        return capsys.readouterr().out

    assert "read from" not in out()
    assert "read from" in out()
    assert "read from" not in out("--run.dtype=bf16")
    assert "read from" not in out("--run.dtype=bf16", "--data.max_length=48")
    (tmp_path / "out" / "reference.safetensors").write_bytes(b"torn")
    assert "is torn" in out("--run.dtype=bf16", "--data.max_length=48")


def test_a_loss_that_is_not_finite_keeps_the_checkpoint(config, monkeypatch, tmp_path):
    """The run stops before the step and names the records; what was saved before stays."""
    run(config(), "--optim.max_steps=2")
    kept = (tmp_path / "out" / "checkpoints" / "step-2" / "model.safetensors").read_bytes()
    real = DPO.__call__
    monkeypatch.setattr(DPO, "__call__", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(RunStopped, match=r"step 3: loss is nan, records \["):
        run(config(), "--optim.max_steps=4")
    assert (tmp_path / "out" / "checkpoints" / "step-2" / "model.safetensors").read_bytes() == kept


def test_final_opens_in_transformers(config, tmp_path):
    run(config())
    assert (tmp_path / "out" / "final" / "tokenizer.json").is_file()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").eval()
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out" / "final")(tokens), theirs(tokens).logits)


def test_master_weights_are_float32(config, world, tmp_path):
    """Weights move at rates that bf16 could not hold."""
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


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--data.max_length=512", "the model takes 256"),
        ("--optim.micro_tokens=20", "one pair has"),
        ("--data.eval_pairs=40", "hold out of 40"),
        ("--model.path=nowhere", "nowhere"),
    ],
)
def test_a_refused_run_writes_nothing(config, tmp_path, override, says):
    with pytest.raises(UserError, match=says):
        run(config(), override)
    assert not (tmp_path / "out").exists()
