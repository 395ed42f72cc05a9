"""The test vectors put to other programs: `python tests/parity/conformance.py trl liger torchtune` prints
docs/conformance.md's tables. A program is a file of adapters, each from settings and one pair to its loss.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VECTORS = Path(__file__).parents[2] / "docs/vectors/vectors.json"
KINDS = ("hand", "draw", "extreme", "tie", "length 1")
TRAINED = ("chosen", "rejected", "chosen_logps")  # through the others no gradient flows in training
FLOAT64, FLOAT32 = (1e-9, 1e-9), (1e-4, 1e-5)  # absolute and relative, as docs/vectors/README.md has them


class Program(NamedTuple):
    name: str  # with its version
    # Loss -> function of settings and one pair, tensors (1,); returns what the program calls it and its loss, or
    # raises NotImplementedError where it has none with these settings.
    losses: dict[str, Callable[[dict, dict[str, Tensor]], tuple[str, Tensor]]]
    gather: Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, tokens, mask -> sums
    # Loss, a word of its row -> why its numbers differ.
    reasons: dict[tuple[str, str], str]


class Row(NamedTuple):
    loss: str  # with the settings that are not at their default
    called: str
    cells: list[str]  # per kind: "yes", "float32", or what differs
    why: str


def rows(program: Program) -> list[Row]:
    """One row per loss and settings, in the order of the file; those that the program lacks are left out."""
    vectors, found = json.loads(VECTORS.read_text()), []
    groups: dict[str, list[dict]] = {}
    for case in vectors["losses"]:
        groups.setdefault(case["loss"] + json.dumps(case["settings"]), []).append(case)
    for cases in groups.values():
        try:
            called, cells = "", {}
            for case in cases:
                called, cells[case["kind"]] = _compared(program, case)
        except NotImplementedError:
            continue
        title = _title(cases[0], vectors["losses"])
        values = [cells.get(kind, "") for kind in KINDS]
        found.append(Row(title, called, values, _why(program, cases[0]["loss"], title, values)))
    gathered = {case["kind"]: _gathered(program, case) for case in vectors["gatherer"]}
    values = [gathered.get(kind, "") for kind in KINDS]
    return [*found, Row("sums of log-probs", "", values, _why(program, "gatherer", "", values))]


def table(program: Program) -> str:
    """The rows in Markdown."""
    lines = [
        f"| {program.name}: loss | called there | {' | '.join(KINDS)} | why |",
        "|" + "---|" * (len(KINDS) + 3),
    ]
    for row in rows(program):
        lines.append(f"| {row.loss} | {row.called} | {' | '.join(row.cells)} | {row.why} |")
    return "\n".join(lines)


def _compared(program: Program, case: dict[str, Any]) -> tuple[str, str]:
    """What the program calls the loss, and how its numbers compare over the pairs of a case."""
    names = list(case["inputs"])
    verdicts, called = [], ""
    for i in range(len(case["losses"])):
        values = {name: case["inputs"][name][i] for name in names}
        pair = {
            n: torch.tensor([x], dtype=torch.float64 if isinstance(x, float) else None)
            for n, x in values.items()
        }
        leaves = [pair[name].requires_grad_() for name in TRAINED if name in pair]
        if case["loss"] not in program.losses:
            raise NotImplementedError
        called, loss = program.losses[case["loss"]](case["settings"], pair)
        gradients = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        expected = [case["losses"][i]] + [case["gradients"][name][i] for name in TRAINED if name in pair]
        found = [loss.sum().item()] + [gradient.item() for gradient in gradients]
        verdicts.append(_verdict(found, expected))
    return called, max(verdicts)[1]


def _verdict(found: list[float], expected: list[float]) -> tuple[float, str]:
    """How bad it is, and in words. The first number is the loss, the others are gradients."""
    for level, (absolute, relative) in enumerate((FLOAT64, FLOAT32)):
        if all(abs(f - e) <= absolute + relative * abs(e) for f, e in zip(found, expected, strict=True)):
            return level, ("yes", "float32")[level]
    i, (f, e) = max(
        enumerate(zip(found, expected, strict=True)),
        key=lambda item: (item[1][0] != item[1][0], abs(item[1][0] - item[1][1]) / (1 + abs(item[1][1]))),
    )
    error = abs(f - e) / (1 + abs(e))
    return 2 + (error if error == error else 1e99), f"{'gradient ' if i else ''}{f:.4g} for {e:.4g}"


def _gathered(program: Program, case: dict[str, Any]) -> str:
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64).requires_grad_()
    tokens, mask = (
        torch.tensor(case["inputs"]["tokens"]),
        torch.tensor(case["inputs"]["response_mask"]).bool(),
    )
    sums = program.gather(logits, tokens, mask)
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    expected = case["sums"] + torch.tensor(case["gradients"]["logits"]).flatten().tolist()
    return _verdict(sums.tolist() + gradient.flatten().tolist(), expected)[1]


def _title(case: dict[str, Any], cases: list[dict]) -> str:
    """The loss, and its settings that differ from those of its first case, which has the defaults."""
    first = next(other["settings"] for other in cases if other["loss"] == case["loss"])
    changed = [f"{name} {value}" for name, value in case["settings"].items() if value != first[name]]
    return " ".join([case["loss"], ", ".join(changed)]).strip()


def _why(program: Program, loss: str, title: str, cells: list[str]) -> str:
    if all(cell in ("yes", "float32", "") for cell in cells):
        return ""
    reasons = [why for (of, word), why in program.reasons.items() if of == loss and word in title]
    return "; ".join(reasons) or "UNEXPLAINED"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n\n".join(table(import_module(f"conform_{name}").program()) for name in sys.argv[1:]))
