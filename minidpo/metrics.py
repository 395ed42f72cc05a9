"""What a run says: lines on the console, progress lines, and metrics.jsonl."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from minidpo.distributed import rank, summed
from minidpo.errors import UserError
from minidpo.files import replacing_file, writing


def say(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)


class Averages:
    """Means over pairs of several quantities. Sums stay on the device until `means` asks for them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count: int | Tensor = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """values: quantity -> one number a pair, (B,)."""
        count = 0
        for name, value in values.items():
            count = len(value)
            total = value.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._count += count

    def over_all_ranks(self) -> "Averages":
        """These sums and counts, added up over the processes of the run."""
        device = next(iter(self._sums.values())).device
        count = torch.tensor(self._count, dtype=torch.float64, device=device)
        *sums, self._count = summed(torch.stack([*self._sums.values(), count])).unbind()
        self._sums = dict(zip(self._sums, sums, strict=True))
        return self

    def mean(self, name: str) -> float:
        return float(self._sums[name] / self._count)

    def means(self) -> dict[str, float]:
        return {name: self.mean(name) for name in self._sums}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl. A torn last one is passed over: the run was killed, or is writing it now.

    Raises UserError that names the file and the line for any other that is no JSON object with a step.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    values = []
    for number, line in enumerate(lines, start=1):
        if _step(line) < math.inf:
            values.append(json.loads(line))
        elif number < len(lines):
            raise UserError(f"{path}:{number}: {line[:40]!r} is no line of metrics; give the file of a run")
    return values


class MetricsFile:
    """metrics.jsonl: one JSON object a logged step. On resume, lines later than the checkpoint are dropped.

    last_step: the checkpoint's; 0 where there is none, and then step 0 is evaluated again: its line goes too.
    tensorboard: the same numbers in `tensorboard` beside it, written anew from metrics.jsonl at each start, so that
    no point is there twice and a run may be given it, or have lost it, at any time.
    """

    def __init__(self, path: Path, last_step: int, tensorboard: bool = False) -> None:
        self.path = path
        self._events: EventFile | None = None
        if rank() != 0:
            return
        kept: list[str] = []
        if path.exists():
            last = last_step or -1
            kept = [line for line in path.read_text().splitlines() if _step(line) <= last]
            with writing(path), replacing_file(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        if tensorboard:
            self._events = EventFile(path.parent / "tensorboard")
            self._events.write([json.loads(line) for line in kept])

    def write(self, values: dict[str, float]) -> None:
        if rank() != 0:
            return
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self._events:
            self._events.write([values])


class EventFile:
    """TensorBoard's form of the metrics: a scalar a key and step, grouped by what stands before a key's slash."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # sections.py has seen that it is there

        self._directory = directory
        with writing(directory):
            for old in directory.glob("events.out.tfevents.*"):
                # A TensorBoard that is watching stops at a file that is gone, but reads on after one that ended.
                os.truncate(old, 0)
            # purge_step tells it to forget what it has read.
            self._writer = SummaryWriter(str(directory), purge_step=0)

    def write(self, lines: list[dict[str, float]]) -> None:
        with writing(self._directory):
            for values in lines:
                for name, value in values.items():
                    if name != "step":
                        self._writer.add_scalar(name, value, values["step"])
            self._writer.flush()  # a killed run has lost nothing, as in metrics.jsonl


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # the torn last line of a killed run


class Progress:
    """Count, rate and time left: a line that rewrites itself on a terminal, a line a minute elsewhere."""

    def __init__(self, label: str, total: int | None = None, unit: str = "items") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._start = self._shown = time.monotonic()
        self._live = rank() == 0 and sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._shown > (0.2 if self._live else 60) and rank() == 0:
            self._shown = now
            begin, end = ("\r\033[K", "") if self._live else ("", "\n")
            print(begin + self._line(now), end=end, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line away: what follows says the result."""
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        end = "\r\033[K" if self._live else ""
        if rank() == 0:
            print(end + self._line(time.monotonic()), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        seconds = max(now - self._start, 1e-9)
        rate = self.done / seconds
        left = (
            f", {duration((self.total - self.done) / rate)} left"
            if self.total and 0 < self.done < self.total
            else ""
        )
        of = f"/{self.total}" if self.total else ""
        return f"{self.label}: {self.done}{of} {self.unit} in {duration(seconds)} ({rate:{',.0f' if rate >= 10 else '.2g'}} a second{left})"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.4s, 3m 20s, 2h 05m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def console_line(values: dict[str, float], total_steps: int, seconds_left: float, prefix: str = "") -> str:
    """One aligned line of a training step or, with prefix "eval/", of an evaluation."""
    columns = [f"{'eval' if prefix else 'step'} {values['step']:>{len(str(total_steps))}}/{total_steps}"]
    for name, label, form in _COLUMNS:
        if prefix + name in values:
            error = values.get(f"{prefix}{name}_standard_error")
            known = "" if error is None else f" ± {error:{form.lstrip('0123456789')}}"
            columns.append(f"{label} {values[prefix + name]:{form}}{known}")
    if not prefix:
        columns += [f"{values['tokens_per_s']:6.0f} tok/s", f"{duration(seconds_left)} left"]
    return "  ".join(columns)


_COLUMNS = (
    ("loss", "loss", "8.4f"),
    ("rewards/accuracies", "accuracy", "5.3f"),
    ("accuracy", "accuracy", "5.3f"),
    ("rewards/margins", "margin", "8.4f"),
    ("margin", "margin", "8.4f"),
    ("rewards/chosen", "chosen", "8.4f"),
    ("rewards/rejected", "rejected", "8.4f"),
    ("lm_loss", "lm", "7.4f"),
    ("kl", "KL", "6.2f"),
    ("sample_length", "length", "5.1f"),
    ("ended", "ended", "4.2f"),
    ("reward", "reward", "7.3f"),
    ("win_rate", "wins", "5.3f"),
    ("tie_rate", "ties", "5.3f"),
    ("grad_norm", "grad", "8.3g"),
    ("lr", "lr", "8.2e"),
)
