"""The commands as typed: one line and status 2 for what the user got wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import small_files

ROOT = Path(__file__).parents[2]


def run(*arguments: object, **named) -> subprocess.CompletedProcess:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | named
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, **pipes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train_dpo.py", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["-m", "minidpo", "fly"], "no command 'fly'"),
        # A path that is not UTF-8 is refused as it was typed: config.toml and the log could not spell it.
        (["-m", "minidpo", "plot", b"caf\xe9"], "caf\\udce9' is not text in UTF-8"),
        (["train_rm.py", "c.toml", b"--run.out=caf\xe9"], "caf\\udce9' is not text in UTF-8"),
    ],
)
def test_mistake(arguments, says):
    """A mistake is one line on stderr and status 2."""
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [["-m", "minidpo"], ["train_dpo.py"], ["train_rm.py"]], ids=" ".join)
def test_closed_pipe(command):
    """`| head` ends a command without a word, also where the output is written at the very end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as pipe:
        result = run(*command, "--help", stdout=pipe)
    assert result.returncode == 141 and result.stderr == ""


@pytest.mark.parametrize("command", [["-m", "minidpo"], ["train_dpo.py"]], ids=" ".join)
def test_full_disk(command, tmp_path):
    """Where the output cannot be written, as in `> file` on a full disk, that is one line and status 1."""
    with (tmp_path / "out").open("w") as out, small_files(10):
        result = run(*command, "--help", stdout=out, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 1
    assert result.stderr == "error: the output cannot be written (File too large); make room\n"


def test_ascii_terminal(world):
    """Characters that it lacks are printed as question marks: a model writes whatever it likes."""
    sample = ["-m", "minidpo", "sample", "--model", world / "model", "--prompt", "é", "--seed", "1"]
    result = run(*sample, "--max-new-tokens", "60", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0, result.stderr
    assert "?" in result.stdout and result.stdout.isascii()
