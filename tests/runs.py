"""Runs of the two scripts in this process, and what they leave behind."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import train_dpo
import train_rm


def run_dpo(arguments: list[str], *overrides: str) -> list[dict]:
    return _run(train_dpo, [*arguments, *overrides])


def run_rm(arguments: list[str], *overrides: str) -> list[dict]:
    return _run(train_rm, [*arguments, *overrides])


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(metrics: list[dict]) -> list[dict]:
    return [m for m in metrics if "loss" in m]


def final(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


def _run(script, arguments: list[str]) -> list[dict]:
    script.main(arguments)
    out = [argument.partition("=")[2] for argument in arguments if argument.startswith("--run.out=")]
    return metrics(Path(out[-1]) if out else Path(arguments[0]).parent / "out")
