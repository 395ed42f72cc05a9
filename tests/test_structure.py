"""The plan of the house, as far as a program can check it. The limits are a budget: raise them by what you add."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

from minidpo.losses import LOSSES

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "minidpo").rglob("*.py"))
SCRIPTS = [ROOT / "train_dpo.py", ROOT / "train_rm.py"]
FILES = [*PACKAGE, *SCRIPTS]

LINES = 8_520
LINES_OF_A_FILE = 260
LINES_OF_A_FUNCTION = 60
LINES_OF_TRAIN_DPO = 130
NAMES_OF_TRAIN_DPO = 30
FLOORS = 8


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def room(file: Path) -> str:
    """A folder of the package is one room, like a file on its top level."""
    return file.relative_to(ROOT / "minidpo").parts[0].removesuffix(".py") if file in PACKAGE else file.stem


def imported(file: Path) -> set[str]:
    """The modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "minidpo":
            found |= {f"minidpo.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@cache
def rooms() -> dict[str, set[str]]:
    """Room -> the rooms it imports."""
    below: dict[str, set[str]] = {room(file): set() for file in FILES}
    for file in FILES:
        names = {name.split(".")[1] for name in imported(file) if name.startswith("minidpo.")}
        below[room(file)] |= names - {room(file)}
    return below


def floor(name: str, above: tuple[str, ...] = ()) -> int:
    """1 for a room that imports no other; otherwise one more than the highest room it imports."""
    assert name not in above, f"an import circle: {' -> '.join((*above, name))}"
    return 1 + max((floor(other, (*above, name)) for other in rooms()[name]), default=0)


def test_lines_of_the_package():
    """Run-time code stays within its budget, file by file and in all."""
    long = {file.name: lines(file) for file in FILES if lines(file) > LINES_OF_A_FILE}
    assert not long
    total = sum(map(lines, FILES))
    assert total <= LINES, f"{total} lines: the budget is LINES in this file; raise it by what you add"


def test_functions_are_short():
    """No function is longer than a screen; the scripts' `main` is the one exception."""
    long = [
        f"{file.name}:{node.lineno} {node.name}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno - node.lineno >= LINES_OF_A_FUNCTION
        and not (file in SCRIPTS and node.name == "main")
    ]
    assert not long


def test_lines_are_not_packed():
    """Nothing escapes the formatter, and no line is wider than 110 columns."""
    for file in FILES:
        text = file.read_text()
        assert "fmt: skip" not in text and "fmt: off" not in text, file
        wide = [f"{file.name}:{n}" for n, line in enumerate(text.splitlines(), 1) if len(line) > 110]
        assert not wide


def test_train_dpo_reads_by_itself():
    """The main script is short and imports few names."""
    assert lines(ROOT / "train_dpo.py") <= LINES_OF_TRAIN_DPO
    nodes = [n for n in ast.walk(tree(ROOT / "train_dpo.py")) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert sum(len(node.names) for node in nodes) <= NAMES_OF_TRAIN_DPO


def test_rooms_stand_on_floors():
    """Imports go downwards only, over at most eight floors."""
    floors = {name: floor(name) for name in rooms()}
    assert max(floors.values()) <= FLOORS, floors


def test_files_import_downwards():
    """No circle within a folder either: files, like rooms, can be read one after the other."""
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in PACKAGE}
    below = {name: imported(file) & modules.keys() - {name} for name, file in modules.items()}

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"an import circle: {' -> '.join((*above, name))}"
        for other in below[name] - done:
            visit(other, (*above, name))
        done.add(name)

    done: set[str] = set()
    for name in modules:
        visit(name, ())


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("logprobs.py", {"torch"}),
        ("textbook.py", {"torch"}),
        ("model/transformer.py", {"torch"}),
        ("losses/preference.py", {"torch", "minidpo"}),
    ],
)
def test_core_imports_torch_alone(file, allowed):
    """What a student reads first needs nothing but PyTorch; the losses also need their settings."""
    modules = imported(ROOT / "minidpo" / file)
    assert {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names) <= allowed
    ours = {name.split(".")[1] for name in modules if name.startswith("minidpo.")}
    assert ours <= {"losses", "settings"}


def test_no_loss_is_named_outside_the_table():
    """Everything about a loss is asked of its object, so adding one changes no file of the package but losses/."""
    for file in FILES:
        if room(file) == "losses" or "demo" in file.relative_to(ROOT).as_posix():
            continue
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in LOSSES, f"{file}:{node.lineno} names the loss {node.value!r}"
