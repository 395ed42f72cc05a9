"""`bench --against`: an opponent's step and ours in turn, on the same pairs; memory and start in processes of their own."""

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minidpo.commands.bench_cases import Settings, with_reward_head
from minidpo.commands.bench_peers import MODES, interleaved, make_trainer
from minidpo.commands.bench_report import quartiles, spread, tell
from minidpo.commands.bench_stages import Step, TextbookStep, seconds
from minidpo.errors import UserError
from minidpo.packing import PairTokens
from minidpo.weights import load_model, save_model, save_reward_model

OPPONENTS = ("naive", "trl", *(f"trl:{mode}" for mode in MODES))


class Child(NamedTuple):
    """What bench_child.py tells of its process."""

    seconds_to_first_step: float
    peak_bytes: int


def against(
    whom: str, places: Path, pairs: PairTokens, settings: Settings, device: torch.device, own: Child
) -> dict[str, dict[str, object]]:
    """Opponents in turn with us: ratios of paired times, and of memory and start to `own` (run_child's)."""
    results: dict[str, dict[str, object]] = {}
    for opponent in OPPONENTS[2:] if whom == "trl" else (whom,):
        if settings.loss == "rm" and opponent == "trl:fused":
            continue  # there is no output layer to fuse
        times = paired_times(opponent, places, pairs, settings, device)
        theirs, ours = zip(*times, strict=True)
        child = run_child(opponent, places)
        ratio = spread([their / our for their, our in times])
        memory = child.peak_bytes / own.peak_bytes
        start = child.seconds_to_first_step / own.seconds_to_first_step
        results[opponent] = {
            "time_ratio": ratio,
            "their_step_seconds": spread(theirs),
            "our_step_seconds": spread(ours),
            "memory_ratio": memory,
            "start_ratio": start,
            **child._asdict(),
        }
        rows = [
            ("time of a step, median of paired ratios (quartiles)", quartiles(ratio)),
            (
                "seconds a step: theirs, ours",
                f"{statistics.median(theirs):.3g}, {statistics.median(ours):.3g}",
            ),
            ("peak memory (MiB)", f"{memory:.2f} ({child.peak_bytes / 2**20:.0f})"),
            ("first step done after (s)", f"{start:.2f} ({child.seconds_to_first_step:.1f})"),
        ]
        tell(f"{'textbook step' if opponent == 'naive' else opponent}, relative to ours", rows)
    return results


def paired_times(
    opponent: str, places: Path, pairs: PairTokens, settings: Settings, device: torch.device
) -> list[tuple[float, float]]:
    """Seconds of every step, theirs and ours, one right after the other."""
    described = json.loads((places / "settings.json").read_text())
    model = load_model(described["model"], device=device)
    ours = Step(copy.deepcopy(model), pairs, settings, device)
    if opponent != "naive":
        del model
        mode = opponent.removeprefix("trl:")
        arguments = Path(described["trl_model"]), pairs, settings, mode, places / "out", settings.steps + 1
        time_ours = partial(seconds, ours, device=device)
        return interleaved(make_trainer(*arguments), pairs, time_ours)[1:]  # the first warms up
    theirs = TextbookStep(model, pairs, settings, device)
    batches = np.split(np.arange(len(pairs)), settings.steps)
    in_turn(theirs, ours, batches[0], device, swap=False)  # warms up
    return [in_turn(theirs, ours, batch, device, swap=bool(k % 2)) for k, batch in enumerate(batches)]


def in_turn(theirs: Callable, ours: Callable, batch: np.ndarray, device, swap: bool) -> tuple[float, float]:
    if swap:
        own = seconds(ours, batch, device)
        return seconds(theirs, batch, device), own
    return seconds(theirs, batch, device), seconds(ours, batch, device)


def write_for_children(
    directory: Path, model, source: Path | None, pairs: PairTokens, settings: Settings
) -> Path:
    """What bench_child.py reads: settings, at most four batches of pairs, the weights as directories."""
    some = pairs.select(np.arange(min(len(pairs), 4 * settings.batch_size)))
    np.savez(directory / "pairs.npz", ids=pairs.ids[: some.bounds[-1, 3]], bounds=some.bounds)
    if source is None:
        save_model(model, directory / "model")
    places = {"model": str(source or directory / "model")}
    places["trl_model"] = places["model"]
    if settings.loss == "rm":
        save_reward_model(with_reward_head(model), directory / "reward")
        places["trl_model"] = str(directory / "reward")
    (directory / "settings.json").write_text(json.dumps({"settings": settings.as_dict(), **places}))
    return directory


def run_child(who: str, places: Path) -> Child:
    """A fresh process that takes up to four steps: when the first was done, reference included, and its peak memory."""
    command = [sys.executable, "-m", "minidpo.commands.bench_child", who, str(places), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"the process for {who} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        )
    return Child(**json.loads(done.stdout.splitlines()[-1]))
