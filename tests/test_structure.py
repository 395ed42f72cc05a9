"""The plan of the house, as far as a program can check it. LINES is a budget: raise it by what you add."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from minidpo.losses import LOSSES

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "minidpo").rglob("*.py"))
SCRIPTS = [ROOT / "train_dpo.py", ROOT / "train_rm.py"]
TEXTS = {file: file.read_text() for file in PACKAGE + SCRIPTS}
TREES = {file: ast.parse(text) for file, text in TEXTS.items()}

LINES = 13_366
LINES_OF_A_FILE = 260
LINES_OF_A_FUNCTION = 60
LINES_OF_TRAIN_DPO = 130
NAMES_OF_TRAIN_DPO = 30
FLOORS = 8


def imported(file: Path) -> set[str]:
    """The modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "minidpo":
            found |= {f"minidpo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def room(file: Path) -> str:
    """A folder of the package is one room, like a file on its top level."""
    return file.relative_to(ROOT / "minidpo").parts[0].removesuffix(".py") if file in PACKAGE else file.stem


def test_lines():
    """Run-time code stays within its budget, file by file and in all; no line is packed or wider than 110."""
    lines = {file: len(text.splitlines()) for file, text in TEXTS.items()}
    assert not [file for file, count in lines.items() if count > LINES_OF_A_FILE]
    total = sum(lines.values())
    assert total <= LINES, f"{total} lines: the budget is LINES in this file; raise it by what you add"
    for file, text in TEXTS.items():
        assert "fmt: skip" not in text and "fmt: off" not in text, file
        assert not [line for line in text.splitlines() if len(line) > 110], file


def test_functions():
    """No function is longer than a screen; the scripts' `main` is the one exception."""
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not (file in SCRIPTS and node.name == "main"):
                assert node.end_lineno - node.lineno < LINES_OF_A_FUNCTION, f"{file} {node.name}"


def test_train_dpo():
    """The main script is short and imports few names."""
    script = ROOT / "train_dpo.py"
    assert len(TEXTS[script].splitlines()) <= LINES_OF_TRAIN_DPO
    nodes = [node for node in ast.walk(TREES[script]) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert sum(len(node.names) for node in nodes) <= NAMES_OF_TRAIN_DPO


def test_floors():
    """Rooms import downwards only, over at most eight floors. A circle is a CycleError that names it."""
    below = {room(file): set() for file in TEXTS}
    for file in TEXTS:
        names = {name.split(".")[1] for name in imported(file) if name.startswith("minidpo.")}
        below[room(file)] |= names - {room(file)}
    floors = {}
    for name in TopologicalSorter(below).static_order():
        floors[name] = 1 + max((floors[other] for other in below[name]), default=0)
    assert max(floors.values()) <= FLOORS, floors


def test_no_circles():
    """Files within a room can be read one after the other too. A circle is a CycleError that names it."""
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in PACKAGE}
    below = {name: imported(file) & modules.keys() - {name} for name, file in modules.items()}
    assert set(TopologicalSorter(below).static_order()) == set(modules)


@pytest.mark.parametrize(
    "name",
    ["logprobs.py", "textbook.py", "model/transformer.py", "losses/preference.py", "losses/log_ratios.py"],
)
def test_core(name):
    """What a student reads first imports PyTorch alone; the losses their settings, the decoder its config."""
    ours = (
        {"minidpo.losses.inputs", "minidpo.losses.preference", "minidpo.settings"}
        if "losses" in name
        else set()
    )
    ours |= {"minidpo.model.model_config", "minidpo.model.rotary"} if "transformer" in name else set()
    for module in imported(ROOT / "minidpo" / name) - ours:
        assert module.split(".")[0] in {"torch", *sys.stdlib_module_names}, module


def test_no_loss_is_named():
    """Everything about a loss is asked of its object, so adding one changes only losses/."""
    for file, tree in TREES.items():
        if room(file) != "losses" and "demo" not in file.relative_to(ROOT).parts:
            constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            assert not set(constants) & set(LOSSES), file
