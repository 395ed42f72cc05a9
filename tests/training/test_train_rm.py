"""train_rm.py as a whole: it learns a preference. That final/ opens elsewhere: test_reward_end.py."""

import pytest
import torch

from minidpo.model import load_model, load_reward_model
from runs import run_rm


def test_it_learns(config):
    """In this world short responses beat long ones; most held-out pairs are told right."""
    settings = "--data.eval_pairs=16 --optim.max_steps=0 --optim.epochs=12 --optim.lr=3e-3".split()
    before, *_, after = run_rm(config(), *settings)
    assert after["eval/accuracy"] >= 0.75
    assert after["eval/preference_loss"] < before["eval/preference_loss"]


def test_reward_head(config, tmp_path):
    """The head is drawn from run.seed and has no bias; such a model gives no logits."""
    for seed in (0, 1):
        run_rm(config(), "--optim.lr=1e-12", f"--run.seed={seed}", f"--run.out={tmp_path / str(seed)}")
    a, b = (load_reward_model(tmp_path / seed / "final") for seed in "01")
    assert not torch.allclose(a.score.weight, b.score.weight)
    assert a.score.bias is None
    with pytest.raises(ValueError, match="no lm_head"):
        _ = a.output_weight
    with pytest.raises(ValueError, match=r"lm_head|score"):
        load_model(tmp_path / "0" / "final")
