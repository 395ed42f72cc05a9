"""What stops a run, or saves it: numbers that are not finite, memory that runs out, and a signal."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from minidpo.distributed import rank, ranks
from minidpo.errors import RunStopped
from minidpo.files import replacing_file, writing
from minidpo.metrics import say
from minidpo.token_store import PairTokens
from minidpo.tokenizer import Tokenizer

Result = TypeVar("Result")


class MicroTokens:
    """How many tokens one pass holds: optim.micro_tokens, or half of it once memory ran out, and half again.

    least: tokens of the longest pair, which must fit in one pass.
    """

    def __init__(self, tokens: int, least: int) -> None:
        self.tokens, self._least = tokens, least

    def fit(self, step: int, work: Callable[[], Result]) -> Result:
        """`work()`, done again from its beginning with half the tokens as often as the GPU's memory runs out.

        How a batch is cut changes nothing but rounding; `work` must clear the gradients it begins with.
        Raises RunStopped where the tokens cannot be halved.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if ranks() > 1:  # the others wait in the middle of their pass
                    raise RunStopped(
                        f"step {step}: out of GPU memory on rank {rank()} with {self.tokens} tokens a pass; lower"
                        " optim.micro_tokens or set run.activation_checkpointing = true, and the same command goes"
                        " on from the last checkpoint"
                    ) from None
            # Only here, where the exception is gone and no longer holds the tensors of the pass that failed.
            self._halve(step)

    def _halve(self, step: int) -> None:
        if self.tokens <= self._least:
            raise RunStopped(
                f"step {step}: out of GPU memory with {self.tokens} tokens a pass, which the longest pair needs:"
                " no smaller optim.micro_tokens would do; set run.activation_checkpointing = true, or lower"
                " data.max_length"
            )
        half = max(self.tokens // 2, self._least)
        say(
            f"step {step}: out of GPU memory with {self.tokens} tokens a pass; again with {half}, which changes"
            f" nothing but rounding (optim.micro_tokens = {half} or run.activation_checkpointing = true avoid it)"
        )
        self.tokens = half
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def require_finite(
    step: int,
    loss: float,
    grad_norm: float,
    out: Path,
    pairs: PairTokens,
    tokenizer: Tokenizer,
    pair_losses: Callable[[], Iterable[float]],
) -> None:
    """Raises RunStopped where loss or gradient norm is not finite, after the batch is written to OUT.

    pairs: the batch. pair_losses: their losses one by one, computed only then, to tell which pair it is.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    what = f"gradient norm is {grad_norm}" if math.isfinite(loss) else f"loss is {loss}"
    file = out / f"bad_batch-step-{step}.json"
    batch: dict[str, Any] = {"step": step, "loss": _plain(loss), "grad_norm": _plain(grad_norm)}
    batch["pairs"] = [described(pairs, row, value, tokenizer) for row, value in enumerate(pair_losses())]
    if rank() == 0:
        with writing(file), replacing_file(file) as temporary:
            temporary.write_text(json.dumps(batch, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    raise RunStopped(
        f"step {step}: {what}, {pairs.records(np.arange(len(pairs)))}; nothing was updated, the checkpoints in"
        f" {out} are from before, and the batch is in {file}"
    )


def described(pairs: PairTokens, row: int, loss: float, tokenizer: Tokenizer) -> dict[str, Any]:
    """One pair for a reader: its place in its file (from 0), its loss, and the ids and text of each role."""
    start, *ends = pairs.bounds[row].tolist()
    place = {} if pairs.file is None else {"file": pairs.files[pairs.file[row]]}
    pair = place | {"record": int(pairs.index[row]), "loss": _plain(loss)}
    for role, end in zip(("prompt", "chosen", "rejected"), ends, strict=True):
        ids = pairs.ids[start:end].tolist()
        pair[role] = {"text": tokenizer.decode(ids), "ids": ids}
        start = end
    return pair


def _plain(value: float) -> float | str:
    """JSON has no name for nan and inf."""
    return value if math.isfinite(value) else str(value)


class StopRequest:
    """True once SIGINT or SIGTERM came: finish the step, save, leave. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked

    def ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked and rank() == 0:  # written past print, which may be what was interrupted
            os.write(
                2, b"\nstopping after this step, and saving; Ctrl-C again stops at once, and loses the step\n"
            )
        self.asked = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Until the block ends, signals only ask.

    Where one of several processes leaves it by an error, SIGTERM goes on doing nothing: torchrun, which ends all once
    one has failed (and after 30 seconds by force), must not cut off the line that says why.
    """
    request = StopRequest()
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    failed = True
    try:
        yield request
        failed = False
    finally:
        if failed and ranks() > 1:
            request.asked = True  # and nothing is said of it
        else:
            for number, handler in before.items():
                signal.signal(number, handler)
