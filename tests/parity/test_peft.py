"""minidpo beside PEFT: the same adapters on the same base give the same logits, and learn the same."""

import os
import shutil

import numpy as np
import pytest
import torch

from families import PHI3
from minidpo.data import PairTokens
from minidpo.errors import UserError
from minidpo.losses import DPO, PairLogps
from minidpo.model import load_model, model_fingerprint, response_logps, save_model
from minidpo.model.adapter_files import save_adapter
from minidpo.model.lora import add_adapters, trained_parameters
from minidpo.packing import pack
from minidpo.sections import LoRASection
from minidpo.textbook import pad, sequence_logps
from runs import run_dpo, run_rm
from tiny import random_pairs, tiny_model

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
    """Of a reward model it also finds the head."""
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
    """What else PEFT's adapters can hold is refused, because it has other tensors, or no place for its own."""
    settings = peft.LoraConfig(r=3, target_modules=["q_proj"], **more)
    peft.get_peft_model(their_base(world / "model"), settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError):
        load_model(world / "model", adapter=tmp_path / "theirs")


def test_training(world, tmp_path):
    """From the same adapters, the losses of ten steps of DPO are those of PEFT."""
    pairs = random_pairs(np.random.default_rng(0), 4)
    lora, batch, loss = LoRASection(rank=4), pack(PairTokens.from_pairs(pairs)), DPO(0.1)
    torch.manual_seed(0)
    ours = load_model(world / "model")
    add_adapters(ours, lora)
    save_adapter(ours, tmp_path, lora, "", model_fingerprint(world / "model"))
    theirs = peft.PeftModel.from_pretrained(their_base(world / "model"), tmp_path, is_trainable=True)
    theirs_trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    tokens, scored = pad([pair[:3] for pair in pairs])
    reference = response_logps(ours, batch).detach()

    def losses(trained, logps) -> list[float]:
        optimizer, values = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1), []
        for _ in range(10):
            value = loss(PairLogps(*logps().T, *reference.T, *batch.lengths.T)).mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        return values

    one = losses(trained_parameters(ours).values(), lambda: response_logps(ours, batch))
    other = losses(
        theirs_trained, lambda: sequence_logps(theirs(tokens).logits, tokens, scored).view(2, -1).T
    )
    assert one[0] == pytest.approx(np.log(2)) and one[-1] < 0.1
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
