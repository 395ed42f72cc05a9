"""`bench --against trl`: TRL's own trainers on the same weights and the same pairs, step by step in turn with ours.

What times TRL is its own training loop (`trainer.train()`), from `on_step_begin` to `on_step_end`: its forward,
backward, clipping and AdamW, without its collation, which happens before. Ours then takes the pairs TRL just took.

    default   as DPOConfig and RewardConfig come, batch size and precision apart: gradient checkpointing, and for
              DPO a reference model that runs alongside
    best      reference precomputed, no gradient checkpointing, batches grouped by length, as far as TRL ships it.
              padding_free is switched off inside TRL 1.16 (with a warning); Liger's kernels need a GPU.
              Its output layer (trl/kernels/chunked_logprob.py) is tiled in any case; on CPU it covers every position.
    fused     best, and its output layer made to cover scored positions only, as it does on CUDA: we tell
              `trl.trainer.utils` that there is a Triton device, and leave the tiles themselves in torch.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minidpo.commands.bench_cases import PAD, Settings
from minidpo.commands.bench_stages import Clock
from minidpo.errors import UserError
from minidpo.packing import PairTokens

MODES = ("default", "best", "fused")


def require_trl(loss: str, mode: str = "") -> None:
    """Raises UserError where TRL is not installed or has no trainer that takes `loss` alone, or none in `mode`."""
    if loss not in ("dpo", "ipo", "rm"):
        raise UserError(f"--against trl compares dpo, ipo and rm; --loss {loss} has no twin in its trainers")
    if loss == "rm" and mode == "fused":
        raise UserError("--against trl:fused is about the output layer, and --loss rm has none; use trl:best")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        import trl  # noqa: F401
    except ImportError:
        raise UserError("--against trl needs the extra `peers`: pip install -e '.[peers]'") from None


def make_trainer(directory: Path, pairs: PairTokens, settings: Settings, mode: str, out: Path, steps: int):
    """A TRL trainer of `steps` steps on the model in `directory`; what it writes goes to `out`."""
    import datasets
    import transformers
    import trl

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    best = mode != "default"
    arguments = dict(
        output_dir=str(out),
        use_cpu=settings.device == "cpu",
        bf16=settings.dtype == "bf16",
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        max_steps=steps,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    if best:
        arguments |= dict(gradient_checkpointing=False, train_sampling_strategy="group_by_length")
        arguments |= dict(remove_unused_columns=False)  # else the lengths it would group by are gone
    tokenizer = word_tokenizer(int(pairs.ids.max()) + 1, eos=int(pairs.ids[pairs.bounds[0, 3] - 1]))
    if settings.loss == "rm":
        rows = [
            {"chosen_ids": p + c, "rejected_ids": p + r, "length": 2 * len(p + c + r)}
            for p, c, r in _ids(pairs)
        ]
        kind, config, extra = trl.RewardTrainer, trl.RewardConfig, {}
    else:
        # It takes text: every id is written as a word of its own, and comes out of the tokenizer as it was.
        rows = [
            {
                "prompt": _words(p),
                "chosen": _words(c),
                "rejected": _words(r),
                "length": len(p) + max(len(c), len(r)),
            }
            for p, c, r in _ids(pairs)
        ]
        kind, config = trl.DPOTrainer, trl.DPOConfig
        extra = dict(
            loss_type=["ipo" if settings.loss == "ipo" else "sigmoid"], precompute_ref_log_probs=best
        )
    if mode == "fused":
        trl.trainer.utils._use_triton = lambda device: True
    data = datasets.Dataset.from_list(rows)
    trainer = kind(
        model=str(directory),
        args=config(**arguments, **extra),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def interleaved(trainer, pairs: PairTokens, ours: Callable[[np.ndarray], float]) -> list[tuple[float, float]]:
    """Seconds of each step: TRL's, and what `ours(the same pairs)` returns, one after the other."""
    from transformers import TrainerCallback

    eos = trainer.processing_class.eos_token_id

    def key(text: list[int]) -> tuple[int, ...]:  # TRL ends a text in EOS that was cut before its own
        return tuple(text[:-1] if text[-1] == eos else text)

    row_of = {key(p + c): row for row, (p, c, _) in enumerate(_ids(pairs))}
    batches, collate = [], trainer.data_collator

    def remembering(examples):
        texts = [e.get("prompt_ids", []) + e["chosen_ids"] for e in examples]
        batches.append(np.array([row_of[key(text)] for text in texts]))
        return collate(examples)

    class Turns(TrainerCallback):
        times = []

        def on_step_begin(self, args, state, control, **others):
            self.clock = Clock(trainer.args.device)

        def on_step_end(self, args, state, control, **others):
            self.clock.stop("step")
            self.times.append((self.clock.seconds["step"], ours(batches[state.global_step - 1])))

    trainer.data_collator = remembering
    trainer.add_callback(Turns())
    trainer.train()
    return Turns.times


def train_telling(trainer, first: Callable[[], None]) -> None:
    """Run `trainer` to its end and call `first` after its first step."""
    from transformers import TrainerCallback

    class First(TrainerCallback):
        def on_step_end(self, args, state, control, **others):
            if state.global_step == 1:
                first()

    trainer.add_callback(First())
    trainer.train()


def word_tokenizer(vocabulary: int, eos: int):
    """A tokenizer in which word <i> is token i, made here: no file and no network."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({_word(i): i for i in range(vocabulary)}, unk_token=_word(PAD)))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=_word(eos), pad_token=_word(PAD))


def _words(ids: list[int]) -> str:
    return "".join(f" {_word(i)}" for i in ids)


def _word(i: int) -> str:
    return f"<{i}>"  # closed: special tokens are found inside words too, and 2 is in 23


def _ids(pairs: PairTokens) -> list[tuple[list[int], list[int], list[int]]]:
    return [
        tuple(pairs.ids[begin:end].tolist() for begin, end in zip(bounds, bounds[1:], strict=False))
        for bounds in pairs.bounds
    ]
