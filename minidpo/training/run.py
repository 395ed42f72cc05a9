"""What happens to a run, as opposed to a model: its processes, directory, checkpoints, log lines and stop
signals.

`Run` never calls the model, the loss or the optimizer while it trains, and has no hooks: the training loop is
in the two scripts.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch

from minidpo.config import DPOConfig, RewardConfig, to_dict, write_config
from minidpo.data import HELD_OUT_BY, PairTokens, Tokenizer, micro_batches
from minidpo.distributed import leave, rank, ranks, shard
from minidpo.errors import STOPPED, RunStopped
from minidpo.log import MetricsFile, Progress, console_line, print0
from minidpo.model import Transformer, model_fingerprint, read_config
from minidpo.model.lora import add_adapters, trained_parameters
from minidpo.sections import naming_key
from minidpo.training.adapters import settle_lora, tell_rounding
from minidpo.training.advice import Advice, tell_new_schedule
from minidpo.training.checkpoint import Checkpoints, run_identity, tokenizer_files
from minidpo.training.device import (
    choose_device,
    compiles_layers,
    describe,
    peak_memory,
    slowdown_of_threads,
)
from minidpo.training.out_directory import lock_directory, require_parts
from minidpo.training.stop import Stop


class Run:
    """One run of a script, from its configuration on. See train_dpo.py for the order in which its methods are
    called."""

    def __init__(self, config: DPOConfig | RewardConfig) -> None:
        settings = config.run
        with naming_key(config, "model.path"):
            read_config(Path(config.model.path))  # Fail now if it is no model directory.
        self._tokenizer_files = tokenizer_files(Path(config.model.path))
        self.config, self.settings = config, settings
        self.out, self.seed, self.dtype = Path(settings.out), settings.seed, settings.dtype
        require_parts(self.out)
        self.device = choose_device(settings.device, settings.threads, settings.dtype, settings.attention)
        self._compile = compiles_layers(settings.compile, self.device)
        settle_lora(config, self.device)
        torch.manual_seed(self.seed)  # for a new reward head and new adapters
        self._stop = Stop()
        self._last_save = (-1, self.out)  # step and directory of the newest checkpoint of this process
        self._tokens, self._seconds = 0, 0.0  # of the steps since the last line of the log
        self._clock = self._started = time.monotonic()

    # --- where it computes --------------------------------------------------------------------------------

    def prepare(self, model: Transformer) -> None:
        """Add adapters if there are any, split the model over torchrun's processes if there are several, and
        say what of it is compiled or computed again in backward. The model has no weights yet, so that no
        process ever holds all of a large one."""
        add_adapters(model, self.config.lora)
        shard(model, self.device, self.dtype)
        model.activation_checkpointing = self.settings.activation_checkpointing
        if self._compile:
            model.compile_layers()

    def micro_batches(
        self, token_counts: np.ndarray, indices: np.ndarray | None = None, label: str = ""
    ) -> Iterator[np.ndarray]:
        """`indices` (default: all) in few parts that fit one pass, optim.micro_tokens; of those, this
        process's share.

        token_counts: how many tokens each pair lays out. A label makes a line of progress.
        """
        indices = np.arange(len(token_counts)) if indices is None else indices
        own = micro_batches(indices, token_counts[indices], self.config.optim.micro_tokens, rank(), ranks())
        progress = Progress(label, sum(map(len, own)), "pairs")
        for part in own:
            yield part
            if label:
                progress.advance(len(part))
        if label:
            progress.close(last_line=False)

    # --- its directory ------------------------------------------------------------------------------------

    def resume(
        self,
        model: Transformer,
        optimizer: torch.optim.AdamW,
        tokenizer: Tokenizer,
        train: PairTokens,
        steps: int,
    ) -> int:
        """Take the directory run.out, load its newest checkpoint if there is one, and return that
        checkpoint's step.

        steps: of the whole run. Raises UserError if another process works in run.out, or if it holds another
        run.
        """
        config, optim = self.config, self.config.optim
        self.steps = steps
        self.fingerprints = self._fingerprints(train)
        identity = run_identity(to_dict(config), self.fingerprints)
        template = tokenizer.chat_template(config.data.template).to_keep
        keep, files = self.settings.keep_checkpoints, self._tokenizer_files
        lora = config.lora, config.model.path
        self._checkpoints = Checkpoints(self.out, identity, keep, files, template, train.on_messages, *lora)
        lock_directory(self.out)
        step = self._checkpoints.resume(model, optimizer)
        tell_new_schedule(config, step, steps, len(train))
        write_config(config, self.out)
        self.first_step = step
        self._metrics = MetricsFile(self.out / "metrics.jsonl", step)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
        self._advice = Advice(config.loss, self.parameters, optim.lr, adapters=config.lora.rank > 0)
        if optim.warmup_steps > steps:
            print0(
                f"warning: warm-up takes {optim.warmup_steps} steps and the run {steps}:"
                f" lr never reaches {optim.lr}"
            )
        return step

    def _fingerprints(self, train: PairTokens) -> dict[str, str]:
        """Of the files whose content makes this run what it is, and how the data was made of them."""
        paths = {"model": Path(self.config.model.path)}
        if isinstance(self.config, DPOConfig) and self.config.loss.needs_reference:
            paths["reference"] = self.config.reference_path
        of_path = {path: model_fingerprint(path) for path in {*paths.values()}}  # equal paths are read once
        fingerprints = {name: of_path[path] for name, path in paths.items()} | {"data": train.fingerprint()}
        if train.date:
            fingerprints["data.date"] = train.date
        if self.config.data.eval_pairs and not self.config.data.eval:
            fingerprints["held-out pairs chosen by"] = HELD_OUT_BY
        return fingerprints

    def announce(self, train: PairTokens, held_out: PairTokens) -> None:
        """The line with which training begins."""
        self._some_pairs = held_out if len(held_out) else train
        batch, where = self.config.optim.batch_size, describe(self.device, self.settings)
        records = "responses" if train.responses == 1 else "pairs"  # one response each, or two
        trained = f"{self.trained:,} trained of " if self.trained < self.parameters else ""
        print0(
            f"{self.config.loss.name}: {trained}{self.parameters:,} parameters, {len(train)} {records} to"
            f" train on, {len(held_out)} held out, {self.steps} steps of {batch} {records} on {where}"
        )
        if self.device.type == "cpu" and (slowdown := slowdown_of_threads()) > 2:
            print0(
                f"warning: {slowdown:.0f} times slower than on one thread, because other programs use the"
                " processors: stop with Ctrl-C and go on with --run.threads=1"
            )

    def save(self, step: int, model: Transformer, optimizer: torch.optim.AdamW) -> None:
        """OUT/checkpoints/step-N, from which the same command goes on. All processes save together."""
        self._last_save = step, self._checkpoints.save(step, model, optimizer)
        self._clock = time.monotonic()

    def finish(self, step: int, model: Transformer, optimizer: torch.optim.AdamW) -> None:
        """OUT/final if all steps are done; otherwise a checkpoint, and the exit status of Ctrl-C."""
        if step < self.steps:
            if self._last_save[0] != step:
                self.save(step, model, optimizer)
            print0(
                f"stopped after step {step}, saved {self._last_save[1]}; the same command goes on from there"
            )
            leave(STOPPED)
        # Written again even if it was there: somebody may have moved it away since.
        final = self._checkpoints.save_final(model)
        tell_rounding(self.config, model, self._some_pairs, self.device)
        if step > self.first_step and (peak := peak_memory(self.device)):
            print0(peak)
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
            self._metrics.write(values)
            seconds_per_step = (time.monotonic() - self._started) / (step - self.first_step)
            with self._stop.if_nobody_reads():
                self._advice.on_step(values)
                print0(console_line(values, self.steps, seconds_per_step * (self.steps - step)))
        if step == self.first_step + 1 and (peak := peak_memory(self.device)):
            print0(f"{peak} in the first step, with optim.micro_tokens = {self.config.optim.micro_tokens}")
        self._clock = time.monotonic()

    def log_evaluation(self, step: int, values: dict[str, float]) -> None:
        """The figures of an evaluation, under "eval/" in metrics.jsonl."""
        logged = {"step": step} | {f"eval/{name}": value for name, value in values.items()}
        self._metrics.write(logged)
        with self._stop.if_nobody_reads():
            self._advice.on_evaluation(values)
            print0(console_line(logged, self.steps, 0, "eval/"))
        self._clock = time.monotonic()

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

    # --- Ctrl-C -------------------------------------------------------------------------------------------

    def stop_on_signals(self) -> AbstractContextManager[None]:
        """Within this block Ctrl-C and SIGTERM only ask the loop to stop after its step."""
        self._clock = self._started = time.monotonic()
        return self._stop.on_signals()

    def stop_requested(self) -> bool:
        """Whether any of the processes was asked to stop: all must leave the loop at the same step."""
        return self._stop.requested()
