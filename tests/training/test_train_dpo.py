"""train_dpo.py as a whole, on files: what it must get right from the first step to the last."""

import re
import shutil

import pytest
import torch

from minidpo.errors import UserError
from minidpo.model import load_model
from padded import saved_weights
from record_files import write
from runs import final, run_dpo


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("--lora.rank=4 --lora.base_dtype=bf16", '--lora.base_dtype = "bf16" needs run.dtype = "bf16"'),
        ("--lora.rank=4 --lora.targets=c_attn", "lora.targets: no linear layer is called 'c_attn'; there"),
        ("--lora.rank=4 --lora.targets=", "--lora.targets = []; it must be a list of at least one name"),
        ("--loss.name=kto --optim.batch_size=1", "optim.batch_size = 1, but kto compares with the other"),
        (
            "--eval.samples=6 --eval.max_new_tokens=250",
            "250 after a prompt of 30 tokens; the model takes 256",
        ),
    ],
)
def test_refused(config, tmp_path, keys, says):
    """Settings that do not go together are told before anything is written, what leaves no room for samples
    before training."""
    with pytest.raises(UserError, match=re.escape(says)):
        run_dpo(config(), *keys.split())
    assert not (tmp_path / ("out/checkpoints" if "eval" in keys else "out")).exists()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ("--loss.name=simpo --reference.path=unread", "warning: simpo has no reference: unread is not read"),
        ("--eval.reward_model=unread", "warning: eval.samples is 0: reward_model of [eval] is not read"),
        ("--eval.samples=2 --data.eval_pairs=0", "warning: no pair is held out, so eval.samples is not read"),
        ("--lora.alpha=8", "warning: lora.rank is 0: alpha of [lora] is not read"),
        ("--loss.name=kto --data.train=TMP/liked.jsonl", "all responses to train on are desirable: kto"),
        ("--loss.name=kto", "kto reads responses one by one: 32 pairs are 32 desirable responses (chosen)"),
    ],
)
def test_told(config, capsys, tmp_path, keys, says):
    """The run says which settings it does not read, and how it reads responses one by one."""
    liked = ({"prompt": f"a cat {i}", "completion": " yes", "label": True} for i in range(9))
    write(tmp_path / "liked.jsonl", *liked)
    run_dpo(config(optim__max_steps=1), *keys.replace("TMP", str(tmp_path)).split())
    assert says in capsys.readouterr().out


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
    names = ".lock checkpoints config.toml final metrics.jsonl reference.safetensors tokens"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names.split()
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
