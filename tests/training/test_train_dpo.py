"""train_dpo.py as a whole, on files: what it must get right from the first step to the last."""

import math
import shutil

import pytest
import torch

from minidpo.errors import UserError
from minidpo.model import load_model, save_reward_model
from padded import saved_weights
from runs import final, run_dpo, steps
from tiny import tiny_reward_model


@pytest.mark.parametrize(
    ("loss", "first"),
    [("dpo", math.log(2)), ("ipo", 1 / (4 * 0.1**2)), ("dpo --loss.label_smoothing=0.2", math.log(2))],
)
def test_first_loss(config, loss, first):
    """While policy equals reference, the loss is its closed form (beta = 0.1) and every margin is 0."""
    before, step, *_ = run_dpo(config(), *f"--loss.name={loss}".split())
    assert before["eval/loss"] == pytest.approx(first, abs=1e-6)
    assert step["loss"] == pytest.approx(first, abs=1e-6)
    assert step["rewards/margins"] == step["rewards/accuracies"] == 0.0


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "sft"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_learns(config, loss, dtype):
    """The held-out loss falls: chosen responses are short here and rejected ones long."""
    metrics = run_dpo(config(), f"--loss.name={loss}", f"--run.dtype={dtype}", "--optim.max_steps=8")
    before, after = (line["eval/loss"] for line in metrics if "eval/loss" in line)
    assert after < before


def test_metric_names(config):
    """A line of training and one of an evaluation have the names that TRL uses, and no others."""
    evaluation, step, *_ = run_dpo(config())
    both = "loss saturated rewards/chosen rewards/rejected rewards/margins rewards/accuracies".split()
    both += "logps/chosen logps/rejected response_length/chosen response_length/rejected".split()
    assert step.keys() == {*both, "step", "epoch", "lr", "grad_norm", "tokens_per_s"}
    assert evaluation.keys() == {"step", *(f"eval/{name}" for name in both)}


@pytest.mark.parametrize("setting", ["optim.micro_tokens=80", "run.activation_checkpointing=true"])
def test_same_gradients(config, tmp_path, setting):
    """How a batch is cut, and what is computed twice, changes losses and gradients by rounding alone."""
    plain = run_dpo(config(), "--optim.micro_tokens=4096")
    other = run_dpo(config(), "--optim.micro_tokens=4096", f"--{setting}", f"--run.out={tmp_path / 'b'}")
    for name in ("loss", "grad_norm"):
        assert [m[name] for m in steps(other)] == pytest.approx([m[name] for m in steps(plain)], rel=1e-4)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("--loss.name=simpo --reference.path=unread", "simpo has no reference: unread is not read"),
        ("--eval.reward_model=unread", "eval.reward_model is not read: eval.samples is 0"),
        ("--lora.alpha=8", "lora.rank is 0, so all weights are trained: alpha of [lora] is not read"),
        ("--loss.name=kto", "kto reads responses one by one: 32 pairs are 32 desirable responses (chosen)"),
    ],
)
def test_told(config, capsys, keys, says):
    """The run says which settings it does not read, and how it reads pairs for a loss of single responses."""
    run_dpo(config(optim__max_steps=1), *keys.split())
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("key", ["model.path", "reference.path"])
def test_reward_model(config, world, tmp_path, key):
    """One in the place of a language model is told before any data is read."""
    model = shutil.copytree(world / "model", tmp_path / "rm")
    save_reward_model(tiny_reward_model(vocab_size=300), model)
    with pytest.raises(UserError, match=rf"^{model}: a reward model \(score.weight\).*; see --{key}"):
        run_dpo(config(), f"--{key}={model}", "--data.train=missing.jsonl")
    assert not (tmp_path / "out").exists()


def test_stored_reference(config, capsys, tmp_path):
    """The reference's log-probs are read again only for the same precision and data, and if they are whole."""

    def said(*overrides: str) -> str:
        shutil.rmtree(tmp_path / "out" / "checkpoints", ignore_errors=True)
        run_dpo(config(), *overrides)
        return capsys.readouterr().out

    assert "read from" not in said()
    assert "read from" in said()
    assert "read from" not in said("--run.dtype=bf16")
    assert "read from" not in said("--run.dtype=bf16", "--data.max_length=48")
    (tmp_path / "out" / "reference.safetensors").write_bytes(b"torn")
    assert "reference.safetensors is spoilt" in said("--run.dtype=bf16", "--data.max_length=48")


def test_what_is_left(config, tmp_path):
    """transformers opens final/ and computes the same logits; nothing is there that was not asked for."""
    run_dpo(config())
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(
        ".lock checkpoints config.toml final metrics.jsonl reference.safetensors tokens".split()
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").eval()
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "out" / "final")(tokens), theirs(tokens).logits)


def test_master_weights(config, world, tmp_path):
    """Weights are float32 under bf16 too: they move at a rate that bf16 would round away."""
    run_dpo(config(), "--run.dtype=bf16", "--optim.lr=1e-6")
    before, after = saved_weights(world / "model"), final(tmp_path / "out")
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        if "proj" in name:
            assert (weight != before[name]).float().mean() > 0.9
