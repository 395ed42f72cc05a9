"""train_rm.py as a whole: the loss is what its docstring says, and the model it leaves opens elsewhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidpo.data import Tokenizer, read_preferences
from minidpo.model import load_model, load_reward_model
from minidpo.tools.score import main as score
from runs import run_rm as run


def test_training_learns_a_preference(config):
    metrics = run(config(), "--optim.max_steps=0", "--optim.epochs=6", "--optim.lr=3e-3")
    assert metrics[-1]["eval/accuracy"] >= 7 / 8  # of 8 pairs: short beats long in this world
    assert metrics[-1]["eval/preference_loss"] < metrics[0]["eval/preference_loss"]


def test_metrics_have_the_agreed_names(config):
    step = run(config())[1]
    assert step.keys() >= {"loss", "accuracy", "margin", "mean_reward", "lm_loss", "preference_loss"}


def test_the_loss_is_the_sum_of_its_stated_parts(config):
    values = run(config(), "--loss.lm_weight=0.5")[1]
    assert values["loss"] == pytest.approx(values["preference_loss"] + 0.5 * values["lm_loss"], rel=1e-6)


def test_lm_weight_zero(config):
    values = run(config(), "--loss.lm_weight=0")[1]
    assert "lm_loss" not in values
    assert values["loss"] == pytest.approx(values["preference_loss"], rel=1e-9)


def test_lm_loss_at_the_start(config, world):
    before = run(config())[0]
    import train_dpo

    out = Path(config()[0]).parent / "sft"
    train_dpo.main([*config(), "--loss.name=sft", f"--run.out={out}"])
    sft = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert before["eval/lm_loss"] == pytest.approx(sft["eval/loss"], rel=1e-5)


@pytest.mark.parametrize(
    "override", ["--loss.margin=1.0", "--loss.label_smoothing=0.2", "--loss.center_weight=0.5"]
)
def test_every_loss_key_changes_the_loss(config, tmp_path, override):
    plain = run(config(), f"--run.out={tmp_path / 'plain'}")[0]["eval/loss"]
    changed = run(config(), override, f"--run.out={tmp_path / 'changed'}")[0]["eval/loss"]
    assert changed != pytest.approx(plain, rel=1e-3)


def test_resume_is_exact(config, tmp_path):
    settings = config(optim__max_steps=6, optim__schedule='"constant"')
    run(settings, f"--run.out={tmp_path / 'once'}")
    run(settings, f"--run.out={tmp_path / 'twice'}", "--optim.max_steps=3")
    run(settings, f"--run.out={tmp_path / 'twice'}")
    once, twice = (load_file(tmp_path / name / "final/model.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert once.keys() == twice.keys()


def test_scores_equal_transformers(config, world, tmp_path):
    transformers = pytest.importorskip("transformers")
    run(config())
    final = tmp_path / "out" / "final"
    score(
        [
            "--reward-model",
            str(final),
            "--data",
            str(world / "pairs.jsonl.gz"),
            "--out",
            str(tmp_path / "s.jsonl"),
        ]
    )
    ours = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(final).eval()
    pair = Tokenizer.from_pretrained(final).encode_pair(next(read_preferences(world / "pairs.jsonl.gz")))
    with torch.no_grad():
        for response, name in ((pair.chosen, "chosen_reward"), (pair.rejected, "rejected_reward")):
            assert theirs(torch.tensor([pair.prompt + response])).logits.item() == pytest.approx(
                ours[name], abs=1e-5
            )


def test_padding_of_a_saved_reward_model(config, world, tmp_path):
    """A batch padded by the saved tokenizer scores the same, although the base model pads with EOS."""
    transformers = pytest.importorskip("transformers")
    model = tmp_path / "pads_with_eos"
    shutil.copytree(world / "model", model)
    for name, change in (
        ("config.json", {"pad_token_id": 2}),
        ("tokenizer_config.json", {"pad_token": "</s>"}),
    ):
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | change))
    run(config(), f"--model.path={model}")
    final = tmp_path / "out" / "final"
    texts = ["\n\nHuman: a cat?\n\nAssistant: yes</s>", "\n\nHuman: no?\n\nAssistant: a dog sleeps well</s>"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(final).eval()
    with torch.no_grad():
        alone = torch.cat([theirs(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        batch = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    torch.testing.assert_close(batch, alone, rtol=1e-5, atol=1e-5)


def test_reward_head(config, tmp_path):
    run(config(), "--optim.lr=1e-12", f"--run.out={tmp_path / 'a'}")
    run(config(), "--optim.lr=1e-12", "--run.seed=1", f"--run.out={tmp_path / 'b'}")
    a, b = (load_reward_model(tmp_path / name / "final") for name in "ab")
    assert not torch.allclose(a.score.weight, b.score.weight)
    assert a.score.bias is None


def test_a_reward_model_gives_no_logits(config, tmp_path):
    run(config())
    model = load_reward_model(tmp_path / "out" / "final")
    with pytest.raises(ValueError, match="no lm_head"):
        model.output_weight  # noqa: B018 (the property is the point)
    with pytest.raises(ValueError, match=r"lm_head|score"):
        load_model(tmp_path / "out" / "final")
