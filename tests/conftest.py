"""A small world of files for the tests: model directories and preferences."""

import gzip
import json
import random
from pathlib import Path

import pytest

from minidpo.data.tokenizer import Tokenizer
from minidpo.model import save_model
from tiny import tiny_model, write_tokenizer


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A directory with model/ (random weights, a tokenizer), other/ (other weights), pairs.jsonl.gz (HH)."""
    directory = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    words = "yes no maybe the a cat dog runs sleeps well badly and then it was good".split()

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    records = []
    for _ in range(40):
        prompt = f"\n\nHuman: {text(1, 6)}?\n\nAssistant:"
        records.append({"chosen": f"{prompt} {text(1, 8)}", "rejected": f"{prompt} {text(9, 14)}"})
    with gzip.open(directory / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    for seed, name in enumerate(("model", "other")):
        write_tokenizer(directory / name, [record["chosen"] for record in records])
        save_model(tiny_model(seed, vocab_size=300), directory / name)
    return directory


@pytest.fixture
def directory(tmp_path) -> Path:
    """A saved tiny model, to be spoilt by a test."""
    save_model(tiny_model(), tmp_path)
    return tmp_path


@pytest.fixture
def tokenizer(world) -> Tokenizer:
    return Tokenizer.from_pretrained(world / "model")


@pytest.fixture
def config(world, tmp_path):
    """Writes a TOML for a few fast steps on `world` and returns the arguments that name it."""

    def write(**settings: object) -> list[str]:
        values = {
            "model.path": f'"{world / "model"}"',
            "data.train": f'["{world / "pairs.jsonl.gz"}"]',
            "data.eval_pairs": 8,
            "data.max_length": 64,
            "data.max_prompt_length": 40,
            "optim.lr": 1e-3,
            "optim.batch_size": 4,
            "optim.micro_tokens": 256,
            "optim.max_steps": 4,
            "run.out": f'"{tmp_path / "out"}"',
            "run.dtype": '"fp32"',
            "run.device": '"cpu"',
            "run.log_every": 1,
        }
        values |= {name.replace("__", "."): value for name, value in settings.items()}
        path = tmp_path / "config.toml"
        path.write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
        return [str(path)]

    return write
