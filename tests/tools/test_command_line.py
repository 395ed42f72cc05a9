"""The commands as typed: one line and status 2 for what the user got wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from minidpo.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train_dpo.py", "nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["train_rm.py", "configs/demo_rm.toml", "--loss.beta=1"], "no key loss.beta"),
        (["-m", "minidpo", "fly"], "no command 'fly'"),
    ],
)
def test_a_mistake(arguments, says):
    """A mistake is one line on stderr and status 2."""
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_help():
    """--help lists the commands, and each is a file or a folder of tools."""
    result = run("-m", "minidpo", "--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in COMMANDS)
    tools = [path.stem for path in (ROOT / "minidpo" / "tools").iterdir()]
    assert set(COMMANDS) <= set(tools)
