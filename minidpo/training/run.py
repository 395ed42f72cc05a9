"""What happens to a run, as opposed to a model: its processes, directory, checkpoints, log and stop signals.

`Run` never calls the model, the loss or the optimizer while it trains, and has no hooks: the training loop is
in the two scripts.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from minidpo.config import DPOConfig, RewardConfig, to_toml
from minidpo.data import PairTokens, Tokenizer, micro_batches
from minidpo.distributed import any_rank, leave, rank, ranks, shard
from minidpo.errors import STOPPED, RunStopped, silence_closed_pipes
from minidpo.files import write_file, writing
from minidpo.log import Progress, console_line, keep_metrics, print0
from minidpo.model import Transformer, read_config
from minidpo.model.lora import add_adapters, trained_parameters
from minidpo.training.adapters import settle_lora, tell_rounding
from minidpo.training.advice import Advice
from minidpo.training.checkpoint import Checkpoints, run_identity
from minidpo.training.device import choose_device, compiles_layers, describe, tell_slow_cpu
from minidpo.training.out_directory import lock_directory, require_parts
from minidpo.training.saved_tokenizer import tokenizer_files


class Run:
    """One run of a script. See train_dpo.py for the order in which its methods are called."""

    def __init__(self, config: DPOConfig | RewardConfig) -> None:
        self.config, self.settings = config, config.run
        self.out, self.seed, self.dtype = Path(config.run.out), config.run.seed, config.run.dtype
        model = Path(config.model.path)
        config.naming("model.path", read_config, model)  # Fail now if it is no model directory.
        self._tokenizer_files = tokenizer_files(model)
        config.naming("run.out", require_parts, self.out)
        self.device = choose_device(config.run.device, config.run.threads, self.dtype, config.run.attention)
        self._compile = compiles_layers(config.run.compile, self.device)
        settle_lora(config, self.device)
        torch.manual_seed(self.seed)  # for a new reward head and new adapters
        self._stop_requested = False
        self._last_save = (-1, self.out)  # step and directory of the newest checkpoint of this process
        self._tokens, self._seconds = 0, 0.0  # of the steps since the last line of the log

    # --- where it computes --------------------------------------------------------------------------------

    def prepare(self, model: Transformer) -> None:
        """Add adapters, split the model over the processes, and say what of it is compiled or computed again
        in backward. It has no weights yet, so that no process ever holds all of a large model."""
        add_adapters(model, self.config.lora)
        shard(model, self.device, self.dtype)
        model.activation_checkpointing = self.settings.activation_checkpointing
        if self._compile:
            model.compile_layers()

    def micro_batches(
        self, token_counts: np.ndarray, indices: np.ndarray | None = None, label: str = ""
    ) -> Iterator[np.ndarray]:
        """This process's share of `indices` (default: all) in parts of at most optim.micro_tokens, by the
        tokens that each pair lays out. A label makes a line of progress."""
        indices = np.arange(len(token_counts)) if indices is None else indices
        own = micro_batches(indices, token_counts[indices], self.config.optim.micro_tokens, rank(), ranks())
        progress = Progress(label, sum(map(len, own)), "pairs")
        for part in own:
            yield part
            progress.advance(len(part))
        progress.close(last_line=False)

    # --- its directory ------------------------------------------------------------------------------------

    def resume(
        self,
        model: Transformer,
        optimizer: torch.optim.AdamW,
        tokenizer: Tokenizer,
        train: PairTokens,
        held_out: PairTokens,
        steps: int,
    ) -> int:
        """Take the directory run.out, load its newest checkpoint, and return its step; 0 without one. Raises
        UserError if run.out is in use, or holds another run. steps: of the whole run."""
        config, optim, self.steps = self.config, self.config.optim, steps
        self.identity = run_identity(config, train)
        template = tokenizer.chat_template(config.data.template).to_keep
        of_tokenizer = self._tokenizer_files, template, train.on_messages
        self._checkpoints = Checkpoints(config, self.identity, steps, *of_tokenizer)
        lock_directory(self.out)
        step = self._checkpoints.resume(model, optimizer)
        self.first_step, self._metrics = step, self.out / "metrics.jsonl"
        if rank() == 0:
            write_file(self.out / "config.toml", to_toml(config))
        seen = keep_metrics(self._metrics, step) if rank() == 0 else []
        self._some_pairs = held_out if len(held_out) else train
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self._advice = Advice(config.loss, parameters, optim.lr, config.lora.rank > 0, seen=seen)
        if optim.warmup_steps > steps:
            what = f"warm-up takes {optim.warmup_steps} steps and the run {steps}"
            print0(f"warning: {what}: lr never reaches {optim.lr}")
        records = "responses" if train.responses == 1 else "pairs"  # one response each, or two
        trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
        of_all = f"{trained:,} trained of " if trained < parameters else ""
        print0(
            f"{config.loss.name}: {of_all}{parameters:,} parameters, {len(train)} {records} to train on,"
            f" {len(held_out)} held out, {steps} steps of {optim.batch_size} {records} on"
            f" {describe(self.device, self.settings)}"
        )
        if self.device.type == "cpu":
            tell_slow_cpu(self.dtype)
        signal.signal(signal.SIGINT, self._stop_at_once)  # until the loop begins
        return step

    def save(self, step: int, model: Transformer, optimizer: torch.optim.AdamW) -> None:
        """OUT/checkpoints/step-N, from which the same command goes on. All processes save together."""
        self._last_save = step, self._checkpoints.save(step, model, optimizer)
        self._clock = time.monotonic()

    def finish(self, step: int, model: Transformer, optimizer: torch.optim.AdamW) -> None:
        """OUT/final if all steps are done; otherwise a checkpoint, and the exit status of Ctrl-C."""
        if step < self.steps:
            if self._last_save[0] != step:
                self.save(step, model, optimizer)
            saved = self._last_save[1]
            print0(f"stopped after step {step}, saved {saved}; the same command goes on from there")
            leave(STOPPED)
        # Written again even if it was there: somebody may have moved it away since.
        final = self._checkpoints.save_final(model)
        tell_rounding(self.config, model, self._some_pairs, self.device)
        nothing_left = f"nothing left to do: step {step} of {self.steps} is done, {final}"
        print0(nothing_left if step == self.first_step else f"done: {final}")
        if self.stop_requested():  # Nothing is lost, but whoever pressed Ctrl-C wants nothing more to run.
            leave(STOPPED)

    # --- its log ------------------------------------------------------------------------------------------

    def due(self, every: int, step: int) -> bool:
        """Whether something done every so many steps (0: only at the end) is to be done after `step`."""
        return step == self.steps or bool(every and step % every == 0)

    def log(self, step: int, values: dict[str, float], tokens: int) -> None:
        """A line of the console and of metrics.jsonl, every run.log_every steps. tokens: of this step."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + time.monotonic() - self._clock
        if step == 1 or self.due(self.settings.log_every, step):
            values = {"step": step} | values | {"tokens_per_s": self._tokens / self._seconds}
            self._tokens, self._seconds = 0, 0.0
            if self.device.type == "cuda":
                values["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            seconds_per_step = (time.monotonic() - self._started) / (step - self.first_step)
            self._write(values, seconds_per_step * (self.steps - step))
        self._clock = time.monotonic()

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write figures under "eval/" in metrics.jsonl. Raises RunStopped if the loss is not finite."""
        if not math.isfinite(x := values["loss"]):
            raise RunStopped(f"step {step}: held-out loss is {x}; checkpoints in {self.out} are from before")
        self._write({"step": step} | {f"eval/{name}": value for name, value in values.items()})
        self._clock = time.monotonic()

    def _write(self, line: dict[str, float], seconds_left: float = 0.0) -> None:
        """A line of metrics.jsonl, on the console too. If whoever read that has gone (`... | head`), the run
        stops as after Ctrl-C, and saves."""
        if rank() == 0:
            with writing(self._metrics), self._metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        try:
            self._advice.on_line(line)
            print0(console_line(line, self.steps, seconds_left))
        except BrokenPipeError:
            silence_closed_pipes()
            self._stop_requested = True

    def require_finite(self, step: int, loss: float, grad_norm: float, batch: PairTokens) -> None:
        """Raises RunStopped before the optimizer takes a step on a loss or gradient that is not finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        what = f"gradient norm is {grad_norm}" if math.isfinite(loss) else f"loss is {loss}"
        where = batch.records(np.arange(len(batch)))
        raise RunStopped(
            f"step {step}: {what}, {where}; nothing was updated,"
            f" and the checkpoints in {self.out} are from before"
        )

    # --- what stops it after its step: Ctrl-C, SIGTERM, or a console that nobody reads any more -------------

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Within this block Ctrl-C and SIGTERM only ask the loop to stop after its step."""
        self._clock = self._started = time.monotonic()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        except (Exception, KeyboardInterrupt):
            # torchrun ends all processes with SIGTERM once one has failed, which must not cut off the line
            # that says why. So the handler stays, and says nothing.
            if ranks() > 1:
                self._stop_requested = True
                before.clear()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_requested(self) -> bool:
        """Whether any of the processes was asked to stop: all must leave the loop at the same step."""
        return any_rank(self._stop_requested)

    def _stop_at_once(self, number: int, frame: object) -> None:
        step, anew = self.first_step, "no checkpoint is saved yet; the same command starts anew"
        raise KeyboardInterrupt(f"the same command goes on after step {step}" if step else anew)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._stop_requested and rank() == 0:
            # os.write, because print may be what was interrupted.
            text = "\nstopping after this step, and saving; Ctrl-C again stops at once, and loses the step\n"
            os.write(2, text.encode())
        self._stop_requested = True
