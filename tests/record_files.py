"""Preference files for the tests, whatever is to stand in them, and how they are refused."""

import gzip
import json
from pathlib import Path

import pytest

from minidpo.data import read_preferences
from minidpo.errors import UserError
from minidpo.sections import DataSection

QUESTION = "\n\nHuman: Is 2 + 2 four?\n\nAssistant:"
GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
SKIP_BAD = DataSection(skip_bad=True)


def write(path: Path, *lines: dict | str | bytes) -> Path:
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    content = b"".join((text.encode() if isinstance(text, str) else text) + b"\n" for text in texts)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path) -> list[dict]:
    """What a file of JSON lines holds."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(path: Path) -> str:
    """The one line with which a file is refused, without the path it begins with."""
    with pytest.raises(UserError) as caught:
        list(read_preferences(path))
    message = str(caught.value)
    assert message.startswith(str(path)) and len(message.splitlines()) == 1
    return message.removeprefix(str(path))


def record(prompt: str, **more: object) -> dict:
    return {"prompt": prompt, "chosen": " yes", "rejected": " no and no", **more}
