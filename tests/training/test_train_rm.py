"""train_rm.py as a whole: it learns a preference. That final/ opens elsewhere: test_reward_end.py."""

import torch

from runs import final, run_rm


def test_it_learns(config):
    """In this world short responses beat long ones; most held-out pairs are told right."""
    settings = "--data.eval_pairs=16 --optim.max_steps=0 --optim.epochs=12 --optim.lr=3e-3".split()
    before, *_, after = run_rm(config(), *settings)
    assert after["eval/accuracy"] >= 0.75
    assert after["eval/preference_loss"] < before["eval/preference_loss"]


def test_reward_head(config, tmp_path):
    """The head is drawn from run.seed."""
    for seed in "01":
        run_rm(config(), "--optim.lr=1e-12", f"--run.seed={seed}", f"--run.out={tmp_path / seed}")
    assert not torch.allclose(*(final(tmp_path / seed)["score.weight"] for seed in "01"))
