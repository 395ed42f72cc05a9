"""`bench --grow`: each cost driver doubled alone; measured growth beside the growth of necessary_flops."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from minidpo.commands.bench_cases import Settings, pairs_of_lengths, random_model
from minidpo.commands.bench_flops import necessary_flops
from minidpo.commands.bench_stages import Step, seconds
from minidpo.metrics import say
from minidpo.model import ModelConfig

PROMPT, ENDING = 128, 80


class Row(NamedTuple):
    doubled: str
    seconds: float
    flops: int
    measured: float  # seconds, relative to the base case's: median of paired ratios
    predicted: float  # flops, likewise


def growth(config: ModelConfig, settings: Settings, device: torch.device) -> list[Row]:
    """Forward and backward (no optimizer: it grows with parameters, not pairs) of a base case and of it doubled."""
    batch = settings.batch_size
    deeper = replace(config, num_hidden_layers=2 * config.num_hidden_layers)
    cases = {
        "base": (config, PROMPT, ENDING, batch),
        "prompt": (config, 2 * PROMPT, ENDING, batch),
        "endings": (config, PROMPT, 2 * ENDING, batch),
        "batch": (config, PROMPT, ENDING, 2 * batch),
        "vocabulary": (replace(config, vocab_size=2 * config.vocab_size), PROMPT, ENDING, batch),
        "depth": (deeper, PROMPT, ENDING, batch),
    }
    say(
        f"\nforward and backward; base: {batch} pairs, prompts {PROMPT}, endings {ENDING}; each doubled in turn"
    )
    say(f"  {'doubled':<12} {'seconds':>9} {'measured':>9} {'predicted':>9}")

    def prepared(shape: ModelConfig, prompt: int, ending: int, pairs: int) -> tuple[Callable[[], float], int]:
        lengths = np.tile([prompt, ending, ending], (pairs, 1))
        tokens = pairs_of_lengths(shape, lengths)
        step = Step(random_model(shape, device), tokens, replace(settings, batch_size=pairs), device)

        def measure() -> float:
            step.optimizer.zero_grad()
            return seconds(step.accumulate, np.arange(pairs), device)

        return measure, necessary_flops(shape, lengths, step.wanted).total

    base, base_flops = prepared(*cases["base"])
    rows: list[Row] = []
    for name, case in cases.items():
        measure, flops = prepared(*case)
        # In turn with the base case, for a machine's speed drifts; the first of each warms up.
        times = np.array([(base(), measure()) for _ in range(1 + settings.steps)])[1:]
        ratio = float(np.median(times[:, 1] / times[:, 0]))
        rows.append(Row(name, float(np.median(times[:, 1])), flops, ratio, flops / base_flops))
        say("  {0:<12} {1:>9.4f} {3:>9.2f} {4:>9.2f}".format(*rows[-1]))
    return rows
