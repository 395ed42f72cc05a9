"""Runs with adapters: what is trained and kept, what the reference is, what other commands make of it."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES
from minidpo.errors import UserError
from minidpo.model import load_model, save_model
from minidpo.model.tensors import count_parameters
from minidpo.tools.explain import main as explain
from minidpo.tools.sample import main as sample
from minidpo.tools.score import main as score
from minidpo.training import reference
from padded import saved_weights
from record_files import read
from runs import final, run_dpo, run_rm
from tiny import tiny_model

LORA = ["--lora.rank=4", "--optim.lr=1e-2"]
BF16 = ["--run.dtype=bf16", "--lora.base_dtype=bf16"]
SAMPLES = ["--eval.samples=3", "--eval.max_new_tokens=6"]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("keys", [[], LORA, LORA + BF16], ids=["all weights", "fp32", "bf16"])
def test_start(config, keys):
    """The first loss is ln 2 and sampled KL is 0: policy and reference are the same weights."""
    first, step, *_, last = run_dpo(config(run__eval_every=4, optim__lr=1e-2), *SAMPLES, *keys)
    assert first["eval/loss"] == step["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval/kl"] == step["rewards/margins"] == step["rewards/accuracies"] == 0.0
    assert last["eval/loss"] < math.log(2) - 0.01 and last["eval/kl"] > 0.01


@pytest.mark.parametrize(
    ("family", "loss", "start"), [("granite", "kto", 0.5), ("phi4 mini", "dpo", math.log(2))]
)
def test_families(config, world, tmp_path, family, loss, start):
    """Scaled logits, fused projections and KTO's z0 change nothing of this: start and merged weights."""
    base = shutil.copytree(world / "model", tmp_path / "model")
    save_model(tiny_model(vocab_size=300, **FAMILIES[family]), base)
    first, *_ = run_dpo(config(), *LORA, *SAMPLES, f"--model.path={base}", f"--loss.name={loss}")
    assert first["eval/loss"] == pytest.approx(start, abs=1e-6) and first["eval/kl"] == 0.0
    assert first.get("eval/z0", 0.0) == 0.0
    adapter, tokens = tmp_path / "out" / "final" / "adapter", torch.arange(3, 43)[None]
    torch.testing.assert_close(
        load_model(base, adapter=adapter)(tokens), load_model(adapter.parent)(tokens), rtol=1e-4, atol=1e-4
    )
    assert count_parameters(adapter.parent) == count_parameters(base)


def test_no_second_model(config, world, tmp_path, monkeypatch):
    """The reference is never loaded, unless reference.path names another one."""
    loaded, real = [], reference.load_model

    def load_model(directory, **named):
        loaded.append(directory)
        return real(directory, **named)

    monkeypatch.setattr(reference, "load_model", load_model)
    run_dpo(config(), *LORA, *SAMPLES, f"--reference.path={world}/../{world.name}/model")
    assert loaded == []
    run_dpo(config(), *LORA, f"--reference.path={world / 'other'}", f"--run.out={tmp_path / 'other'}")
    assert loaded == [world / "other"]


@pytest.mark.parametrize(("run", "head"), [(run_dpo, 0), (run_rm, 32)])
def test_trained(config, world, tmp_path, capsys, run, head):
    """Adapters and a reward head are trained, and counted; final/ has W + s B A, and all else as it was."""
    run(config(), *LORA, "--lora.targets=q_proj,down_proj", "--run.activation_checkpointing=true")
    count = 2 * 4 * (32 + 32 + 48 + 32) + head  # two layers, r = 4, in + out of each target
    assert f": {count:,} trained of " in capsys.readouterr().out
    before, after, out = saved_weights(world / "model"), final(tmp_path / "out"), tmp_path / "out"
    adapter = tensors(out / "final" / "adapter")
    assert sum(value.numel() for value in adapter.values()) == count
    for name, weight in before.items():
        if name in after:  # A reward model has no output matrix.
            layer = f"base_model.model.{name.removesuffix('weight')}"
            a, b = (adapter.get(f"{layer}lora_{x}.weight") for x in "AB")
            change = torch.zeros_like(weight) if a is None else 32 / 4 * b @ a
            torch.testing.assert_close(after[name], weight + change)
            assert torch.equal(after[name], weight) == (a is None)


@pytest.mark.parametrize("run", [run_dpo, run_rm])
def test_checkpoint(config, tmp_path, run):
    """It holds adapters and their moments alone (test_resume.py goes on from one), and is told to be no model."""
    run(config(), *LORA, "--optim.max_steps=2")
    checkpoint = tmp_path / "out" / "checkpoints" / "step-2"
    moments = load_file(checkpoint / "optimizer.safetensors")
    assert not list(checkpoint.glob("model*")) and len(moments) == 3 * len(tensors(checkpoint))
    for directory in (checkpoint, tmp_path / "out" / "final" / "adapter"):
        with pytest.raises(UserError, match="it is an adapter: give the model that it belongs to"):
            load_model(directory)


def test_another_run(config, world, tmp_path):
    """Another base, other adapters and a run without them are told."""
    run_dpo(config(), *LORA)
    other = shutil.copytree(world / "model", tmp_path / "model")
    weights = saved_weights(other)
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors")
    for override, says in (
        (f"model.path={other}", "model.path = '"),
        ("lora.targets=q_proj", "lora.targets = "),
        ("lora.rank=0", "lora.rank = 4, now it is 0"),
    ):
        with pytest.raises(UserError, match=f"step-4 was made with {re.escape(says)}"):
            run_dpo(config(), *LORA, f"--{override}")
    run_dpo(config(), *LORA, "--lora.final_dtype=bf16")  # This may change.


@pytest.mark.parametrize("run", [run_dpo, run_rm])
def test_final_in_bf16(config, world, tmp_path, capsys, run):
    """It says what rounding the merged weights costs: by how much final/ differs from its adapter."""
    pairs = str(world / "pairs.jsonl.gz")
    run(config(data__eval=f'["{pairs}"]'), *LORA, "--lora.final_dtype=bf16")
    said = re.search(r"final/ in bf16 changes .* by (\S+) .*on 16 pairs", capsys.readouterr().out)
    out = tmp_path / "out"
    assert {value.dtype for value in final(out).values()} == {torch.bfloat16}
    option, columns = ("--model", "logps") if run is run_dpo else ("--reward-model", "reward")
    values = []
    for model in ([str(out / "final")], [str(world / "model"), "--adapter", str(out / "final" / "adapter")]):
        score([option, *model, "--data", pairs, "--out", str(tmp_path / "scores.jsonl")])
        rows = read(tmp_path / "scores.jsonl")[:16]
        values.append([row[f"{name}_{columns}"] for row in rows for name in ("chosen", "rejected")])
    assert float(said[1]) == pytest.approx(np.abs(np.subtract(*values)).mean(), rel=0.06)


@pytest.mark.parametrize("adapter", ["final/adapter", "checkpoints/step-4"])
def test_score(config, world, tmp_path, capsys, adapter):
    """A base with its adapter scores as final/ does, by the settings of the run."""
    run_dpo(config(), *LORA, "--loss.beta=0.37")
    run_rm(config(), *LORA, f"--run.out={tmp_path / 'rm'}")
    data = ["--data", str(world / "pairs.jsonl.gz"), "--out", str(tmp_path / "scores.jsonl")]
    for kind, out in (("--model", "out"), ("--reward-model", "rm")):
        rows = []
        with_adapter = [kind, str(world / "model"), "--adapter", str(tmp_path / out / adapter)]
        for model in ([kind, str(tmp_path / out / "final")], with_adapter):
            extra = ["--reference", str(world / "model")] if kind == "--model" else []
            score([*model, *data, *extra])
            said = capsys.readouterr().out
            assert kind != "--model" or f"beta 0.37 (as {tmp_path / 'out'}/config.toml says)" in said
            rows.append(read(tmp_path / "scores.jsonl"))
        for merged, apart in zip(*rows, strict=True):
            assert apart == pytest.approx(merged, rel=1e-4, abs=1e-4)


def test_sample_and_explain(config, world, tmp_path, capsys):
    """They too ask a base with its adapter, by the chat template that the run has left with it."""
    run_dpo(config(), *LORA, "--data.template=hh")
    adapter = ["--model", str(world / "model"), "--adapter", str(tmp_path / "out" / "final" / "adapter")]
    merged = ["--model", str(tmp_path / "out" / "final")]
    said = []
    for model in (adapter, merged):
        capsys.readouterr()
        sample([*model, "--human", "a cat?", "--max-new-tokens", "8", "--temperature", "0"])
        explain([*model, "--prompt", "a cat?", "--chosen", " yes", "--rejected", " no", "--json"])
        text, table = capsys.readouterr().out.rsplit("\n{", 1)
        said.append((text, json.loads("{" + table)["chosen_logps"]))
    assert said[0][0] == said[1][0] and said[0][1] == pytest.approx(said[1][1], abs=1e-4)


def test_rounded_base(config, world, tmp_path, capsys):
    """Float32 weights that are held in bf16 are rounded, in final/ too, and the run says so."""
    run_dpo(config(optim__max_steps=1), *LORA, *BF16)
    assert f"the float32 weights of {world / 'model'} are held in bf16, and are" in capsys.readouterr().out
    name = "model.norm.weight"
    before, after = saved_weights(world / "model")[name], final(tmp_path / "out")[name]
    assert torch.equal(after, before.bfloat16().float()) and not torch.equal(after, before)
