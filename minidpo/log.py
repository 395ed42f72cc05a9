"""What runs and commands say: lines and tables on the console, progress lines, and metrics.jsonl."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidpo.distributed import all_reduce_sum, rank
from minidpo.errors import UserError
from minidpo.files import write_json_lines, writing
from minidpo.logprobs import widest_float


def print0(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)


def aligned(rows: Sequence[Sequence[str]], width: int = 8) -> str:
    """One line per row: the first column is aligned left, the others right and at least `width` wide.

    A row may end before the others do.
    """
    first, *others = zip_longest(*rows, fillvalue="")
    columns = [[cell.ljust(max(map(len, first))) for cell in first]]
    columns += [[cell.rjust(max(width, *map(len, column))) for cell in column] for column in others]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


class Means:
    """Means over pairs of several quantities. The sums stay on the device until `means` reads them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Any] = {}  # ints, or tensors if they were counted on the device

    def add(self, values: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> None:
        """values: quantity -> one number per pair, (B,), or (numbers, mask): those where the mask is true."""
        for name, value in values.items():
            numbers, mask = value if isinstance(value, tuple) else (value, None)
            numbers = numbers.detach().to(widest_float(numbers.device))
            # numbers[mask] would wait for the GPU, which has to say how many there are.
            total = (numbers if mask is None else torch.where(mask, numbers, 0)).sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + (len(numbers) if mask is None else mask.sum())

    def means(self) -> dict[str, float]:
        """The means over the pairs of all processes. A quantity that no pair has is left out."""
        table = zip(self._sums, *self.all_reduce().tolist(), strict=True)
        return {name: sum_ / n for name, sum_, n in table if n}

    def all_reduce(self) -> Tensor:
        """Sums and counts over all processes, (2, quantities), on the device."""
        counts = [torch.zeros_like(sum_) + self._counts[name] for name, sum_ in self._sums.items()]
        return all_reduce_sum(torch.stack([*self._sums.values(), *counts]).view(2, -1))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl. A torn last line is passed over: the run was killed, or is writing it.
    Any other line that is no JSON object with a step is a UserError."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            read = json.loads(line)
        except (ValueError, RecursionError):
            read = None
        if isinstance(read, dict) and type(read.get("step")) is int:
            values.append(read)
        elif number < len(lines):
            raise UserError(f"{path}:{number}: {line[:40]!r} is no line of metrics; delete it, or name a run")
    return values


def keep_metrics(path: Path, last_step: int) -> list[dict[str, float]]:
    """Drop the lines of a metrics.jsonl after last_step, the checkpoint's; if that is 0, all: step 0 is
    evaluated again. Returns the others."""
    with writing(path):  # Written anew even if all lines stay: a link would lead out of the run.
        lines = read_metrics(path) if path.exists() else []
        kept = [line for line in lines if line["step"] <= (last_step or -1)]
        write_json_lines(path, kept)
    return kept


class Progress:
    """Count, rate and time left: a line that rewrites itself on a terminal; elsewhere one per minute. Without
    a label it says nothing."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._start = self._shown = time.monotonic()
        self._told = rank() == 0 and bool(label)
        self._live = self._told and sys.stderr is not None and sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self._shown > (0.2 if self._live else 60) and self._told:
            self._shown = now
            begin, end = ("\r\033[K", "") if self._live else ("", "\n")
            print(begin + self._line(now), end=end, file=sys.stderr, flush=True)

    def close(self, last_line: bool = True) -> None:
        """Remove the line from a terminal; print it a last time unless what comes next says the result."""
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if last_line and self._told:
            print(self._line(time.monotonic()), file=sys.stderr, flush=True)

    def _line(self, now: float) -> str:
        seconds = max(now - self._start, 1e-9)
        rate, of, left = self.done / seconds, f"/{self.total}" if self.total else "", ""
        if self.total and 0 < self.done < self.total:
            left = f", {duration((self.total - self.done) / rate)} left"
        per_second = f"{rate:{',.0f' if rate >= 10 else '.2g'}} per second"
        return f"{self.label}: {self.done}{of} {self.unit} in {duration(seconds)} ({per_second}{left})"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.4s, 3m 20s, 2h 05m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m {rest:02d}s" if minutes < 60 else f"{minutes // 60}h {minutes % 60:02d}m"


def console_line(values: dict[str, float], total_steps: int, seconds_left: float) -> str:
    """One aligned line of what metrics.jsonl has of a training step or, under "eval/", of an evaluation."""
    prefix = "" if "loss" in values else "eval/"
    columns = [f"{'eval' if prefix else 'step'} {values['step']:>{len(str(total_steps))}}/{total_steps}"]
    for name, label, form in COLUMNS:
        if prefix + name in values:
            error = values.get(f"{prefix}{name}_standard_error")
            known = "" if error is None else f" ± {error:{form.lstrip('0123456789')}}"
            columns.append(f"{label} {values[prefix + name]:{form}}{known}")
    if not prefix:
        columns += [f"{values['tokens_per_s']:6.0f} tok/s", f"{duration(seconds_left)} left"]
    return "  ".join(columns)


COLUMNS = (
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
    ("peak_memory_gb", "GB", "5.1f"),
    ("lr", "lr", "8.2e"),
)
