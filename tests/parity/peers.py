"""What test_peers.py compares: TRL's trainers and minidpo's numbers, on the same models and the same pairs.

TRL trains on batches of one at learning rate 0 and logs: so it logs its numbers of every single pair.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from minidpo.data import PairTokens, PreferencePair, Tokenizer
from minidpo.losses import PairLogps
from minidpo.model import response_logps, save_model, save_reward_model
from minidpo.packing import pack
from tiny import gradients, tiny_model, tiny_reward_model, write_tokenizer

WORDS = "the a cat dog sees likes small red house tree and not because 12 7 yes no sun moon well".split()
PAIRS = 6  # compared one by one; training goes over all 40


def import_trl():
    """TRL, without a network, or a skip."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    pytest.importorskip("transformers")
    return pytest.importorskip("trl")


def make_world(directory: Path) -> SimpleNamespace:
    """Policy, reference and reward model with their directories; 40 pairs as TRL's records and as ids."""
    from transformers import AutoTokenizer

    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most + 1)))

    records = [
        {"prompt": f"\n\nHuman: {words(9)}\n\nAssistant:"}
        | {"chosen": f" {words(8)}", "rejected": f" {words(8)}"}
        for _ in range(40)
    ]
    write_tokenizer(directory / "policy", [" ".join(record.values()) for record in records])
    tokenizer = Tokenizer.from_pretrained(directory / "policy")
    size = dict(vocab_size=tokenizer.vocab_size, pad_token_id=0)
    policy, reference = tiny_model(seed=1, **size), tiny_model(seed=2, **size)
    reward = tiny_reward_model(**size)
    save_model(policy, directory / "policy")
    save_model(reference, directory / "reference")
    save_reward_model(reward, directory / "reward")
    return SimpleNamespace(
        directory=directory,
        models=SimpleNamespace(policy=policy, reference=reference, reward=reward),
        records=records,
        pairs=tokenizer.encode_pairs([PreferencePair(**record, index=i) for i, record in enumerate(records)]),
        processing_class=AutoTokenizer.from_pretrained(directory / "policy"),
    )


def dpo_trainer(trl, world, out: Path, **settings):
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(world.directory / "reference")
    objects = dict(ref_model=reference)
    return _trainer(trl.DPOTrainer, trl.DPOConfig, world, "policy", out, objects, max_length=None, **settings)


def cpo_trainer(world, out: Path, **settings):
    """TRL's home of SimPO."""
    cpo = pytest.importorskip("trl.experimental.cpo")
    return _trainer(cpo.CPOTrainer, cpo.CPOConfig, world, "policy", out, {}, max_length=512, **settings)


def reward_trainer(trl, world, out: Path, **settings):
    kind, config = trl.RewardTrainer, trl.RewardConfig
    return _trainer(kind, config, world, "reward", out, {}, max_length=None, **settings)


def logs_of(trainer) -> list[dict[str, float]]:
    """One record per step: loss, grad_norm and whatever the trainer logs."""
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


class OurPair:
    """What minidpo computes of one pair: its log-probs and lengths, (1,) each."""

    def __init__(self, world, index: int):
        batch = pack(PairTokens.from_pairs([world.pairs[index]]))
        self.model = world.models.policy
        self.chosen, self.rejected = response_logps(self.model, batch).T
        with torch.no_grad():
            reference = response_logps(world.models.reference, batch).T
        self.lengths = batch.lengths.T  # chosen, rejected
        self.logps = PairLogps(self.chosen, self.rejected, *reference, *self.lengths)


def gradient_norm(model: torch.nn.Module, loss: Tensor) -> Tensor:
    return torch.stack([grad.norm() for grad in gradients(model, loss.sum()).values()]).norm()


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }


def assert_logged(record: dict[str, float], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(value.item(), record[name], rtol=1e-5, atol=1e-5, err_msg=name)


def _trainer(
    kind, config, world, model, out, objects, batch_size=1, steps=PAIRS, lr=0.0, rows=None, **settings
):
    """A TRL trainer in float32 on the CPU: pairs in file order, plain AdamW, no clipping, nothing saved."""
    from datasets import Dataset

    args = config(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        optim="adamw_torch",
        learning_rate=lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1e9,  # 0 would switch the logging of grad_norm off
        gradient_checkpointing=False,
        **settings,
    )
    return kind(
        model=str(world.directory / model),
        args=args,
        train_dataset=Dataset.from_list(world.records if rows is None else rows),
        processing_class=world.processing_class,
        **objects,
    )
