"""`bench --against trl:best`: TRL's own trainers on the same weights and pairs, in turn with our step.

What is timed is TRL's own training loop (`trainer.train()`), from `on_step_begin` to `on_step_end`: forward,
backward, clipping and AdamW, but not its collation, which happens before. Ours then takes the same pairs.
Its settings are the fastest: reference precomputed, no gradient checkpointing, batches grouped by length.
padding_free is switched off inside TRL 1.16, and Liger's kernels need a GPU.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from minidpo.errors import UserError
from minidpo.losses import BradleyTerry, PreferenceLoss
from minidpo.tools.bench_steps import PAD, Case, now

NAMES = ("trl", "trl:best")  # one thing, of the command line


def require_trl(loss: PreferenceLoss | BradleyTerry) -> None:
    """Raises UserError where TRL is not installed or has no trainer of this loss."""
    if not isinstance(loss, BradleyTerry) and not loss.needs_reference:
        raise UserError(f"--against trl: --loss {loss.name} has no counterpart in TRL's DPOTrainer")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        import trl  # noqa: F401
    except ImportError:
        raise UserError("--against trl needs the extra `peers`: pip install -e '.[peers]'") from None


def make_trainer(case: Case, out: Path, steps: int):
    """A TRL trainer of `steps` steps; what it writes goes to `out`."""
    import datasets
    import transformers
    import trl

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    optim = case.config.optim
    settings: dict[str, object] = dict(output_dir=str(out), max_steps=steps, max_length=None)
    settings |= dict(use_cpu=case.device.type == "cpu", bf16=case.config.run.dtype == "bf16")
    settings |= dict(learning_rate=optim.lr, lr_scheduler_type="constant")
    settings |= dict(per_device_train_batch_size=optim.batch_size // case.their_passes)
    settings |= dict(gradient_accumulation_steps=case.their_passes)
    settings |= dict(report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no")
    settings |= dict(remove_unused_columns=False)  # keeps "row" and "length"
    settings |= dict(gradient_checkpointing=False, train_sampling_strategy="group_by_length")
    base: Any = trl.RewardTrainer if case.rewards else trl.DPOTrainer
    config = trl.RewardConfig if case.rewards else trl.DPOConfig
    if not case.rewards:
        settings |= dict(loss_type=[case.config.loss.trl], precompute_ref_log_probs=True)

    class Trainer(base):
        def _prepare_dataset(self, dataset, *others):
            return dataset  # Token ids as they are: TRL would tokenize text.

    # The only thing it needs a tokenizer for is the padding token.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": PAD}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>"
    )
    rows = []
    for row, (prompt, chosen, rejected) in enumerate(case.token_lists()):
        if case.rewards:  # Its trainer takes whole texts.
            prompt, chosen, rejected = [], prompt + chosen, prompt + rejected
        ids = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        rows.append({"row": row, "length": len(prompt) + max(len(chosen), len(rejected))} | ids)
    rows, args = datasets.Dataset.from_list(rows), config(**settings)
    trainer = Trainer(str(case.directory), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train_trl(
    case: Case, steps: int, ours: Callable[[np.ndarray], float] = lambda batch: 0.0
) -> tuple[list[tuple[float, float]], list[np.ndarray]]:
    """Seconds of each step, TRL's and what `ours(the same pairs)` returns, and the rows of those pairs."""
    from transformers import TrainerCallback

    times: list[tuple[float, float]] = []
    passes: list[list[int]] = []  # the rows of each
    batches: list[np.ndarray] = []

    def remember(examples):
        passes.append([example["row"] for example in examples])
        return collate(examples)

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            self.started = now(case.device)

        def on_step_end(self, args, state, control, **others):
            theirs, end = now(case.device) - self.started, state.global_step * case.their_passes
            batches.append(np.concatenate(passes[end - case.their_passes : end]))
            times.append((theirs, ours(batches[-1])))

    with tempfile.TemporaryDirectory() as out:
        trainer = make_trainer(case, Path(out), steps)
        collate, trainer.data_collator = trainer.data_collator, remember
        trainer.add_callback(Turns())
        trainer.train()
    return times, batches
