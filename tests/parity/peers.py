"""The same models and pairs for TRL and minidpo, and what each computes from them.

TRL trains on batches of one at learning rate 0, so what it logs of a step are its numbers of a single pair.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from minidpo.data import PairTokens
from minidpo.losses import PairLogps
from minidpo.model import response_logps
from minidpo.packing import pack
from tiny import gradients

PAIRS = 6  # compared one by one; training goes over all 40


def trainer(world, out: Path, kind: str, records=None, **settings):
    """TRL's DPOTrainer, CPOTrainer or RewardTrainer: float32, pairs in file order, AdamW, no clipping."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    trl = pytest.importorskip(f"trl.experimental.{kind.lower()}" if kind in ("CPO", "ORPO") else "trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = world.directories
    tokenizer = AutoTokenizer.from_pretrained(files["policy"])
    ours = AutoModelForCausalLM.from_pretrained(files["reference"])
    reference = {"ref_model": ours} if kind in ("DPO", "KTO") else {}
    common = dict(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        max_length=512,
        max_steps=PAIRS,
        optim="adamw_torch",
        learning_rate=0.0,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1e9,  # 0 would switch the logging of grad_norm off
        gradient_checkpointing=False,
    )
    return getattr(trl, f"{kind}Trainer")(
        model=str(files["reward" if kind == "Reward" else "policy"]),
        args=getattr(trl, f"{kind}Config")(**common | settings),
        train_dataset=Dataset.from_list(records or world.records),
        processing_class=tokenizer,
        **reference,
    )


def trl_logs(*args, **settings) -> list[dict[str, float]]:
    """One record per step: loss, grad_norm and whatever the trainer logs."""
    trl_trainer = trainer(*args, **settings)
    trl_trainer.train()
    return [record for record in trl_trainer.state.log_history if "loss" in record]


def our_pair(world, index: int) -> PairLogps:
    """What minidpo computes of one pair, (1,) each."""
    batch = pack(PairTokens.from_pairs([world.pairs[index]]))
    with torch.no_grad():
        reference = response_logps(world.reference, batch).T
    return PairLogps(*response_logps(world.policy, batch).T, *reference, *batch.lengths.T)


def gradient_norm(model: torch.nn.Module, loss: Tensor) -> Tensor:
    return torch.stack([grad.norm() for grad in gradients(model, loss.sum()).values()]).norm()


def assert_logged(record: dict[str, float], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(value.item(), record[name], rtol=1e-5, atol=1e-5, err_msg=name)
