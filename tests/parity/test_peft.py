"""minidpo beside PEFT: the same adapters on the same base give the same logits."""

import os
import shutil

import pytest
import torch

from families import PHI3
from minidpo.errors import UserError
from minidpo.model import load_model, save_model
from runs import run_dpo, run_rm
from tiny import tiny_model

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

TOKENS = torch.arange(3, 43).view(2, 20)
SCALED = ["--lora.rank=4", "--lora.rank_scaled=true", "--lora.alpha=3", "--optim.lr=1e-2"]


def their_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("family", [{}, PHI3], ids=["llama", "phi3"])
def test_language_model(config, world, tmp_path, family):
    """PEFT opens the adapter of a run: its logits are those of the merged model."""
    base, final = shutil.copytree(world / "model", tmp_path / "model"), tmp_path / "out" / "final"
    save_model(tiny_model(vocab_size=300, **family), base)
    run_dpo(config(), *SCALED, f"--model.path={base}")
    theirs = peft.PeftModel.from_pretrained(their_base(base), final / "adapter")
    with torch.no_grad():
        logits = load_model(final)(TOKENS)
        assert (logits - load_model(base)(TOKENS)).abs().max() > 0.1
        for model in (theirs, their_base(final)):
            torch.testing.assert_close(model(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def test_reward_model(config, world, tmp_path):
    """PEFT opens the adapter of a reward model, and finds its head too."""
    run_rm(config(), *SCALED)
    classifier, final = transformers.AutoModelForSequenceClassification, tmp_path / "out" / "final"
    base = classifier.from_pretrained(world / "model", num_labels=1, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(base, final / "adapter")
    merged = classifier.from_pretrained(final)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, merged(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_their_file(world, tmp_path):
    """An adapter that PEFT has saved is read here."""
    settings = peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(their_base(world / "model"), settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(world / "model", adapter=tmp_path / "theirs")
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "more",
    [dict(use_dora=True), dict(rank_pattern={"q_proj": 5}), dict(alpha_pattern={"q_proj": 5})]
    + [dict(layers_to_transform=[0]), dict(trainable_token_indices=[3])],
    ids=str,
)
def test_more_than_lora(world, tmp_path, more):
    """Adapters that are not plain LoRA on all layers are refused: their tensors or scales differ."""
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], **more)
    peft.get_peft_model(their_base(world / "model"), settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError):
        load_model(world / "model", adapter=tmp_path / "theirs")
