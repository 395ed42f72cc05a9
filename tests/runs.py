"""Runs of the two scripts in this process, and what they leave behind."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_dpo
import train_rm


def run_dpo(arguments: list[str], *overrides: str) -> list[dict]:
    return _run(train_dpo.main, arguments, overrides)


def run_rm(arguments: list[str], *overrides: str) -> list[dict]:
    return _run(train_rm.main, arguments, overrides)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(metrics: list[dict]) -> list[dict]:
    return [m for m in metrics if "loss" in m]


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


def _run(main: Callable[[list[str]], None], arguments: list[str], overrides: tuple[str, ...]) -> list[dict]:
    main([*arguments, *overrides])
    out = next((o.partition("=")[2] for o in overrides if o.startswith("--run.out")), None)
    return metrics(Path(out) if out else Path(arguments[0]).parent / "out")
