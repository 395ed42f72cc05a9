"""The test vectors put to other programs: `python tests/parity/conformance.py trl liger torchtune` prints
docs/conformance.md's tables. A program is a file of adapters, each from settings and one pair to its loss.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VECTORS = json.loads((Path(__file__).parents[2] / "docs/vectors/vectors.json").read_text())
KINDS = ("hand", "draw", "extreme", "tie", "length 1")
TRAINED = ("chosen", "rejected", "chosen_logps")  # through the others no gradient flows in training
# Absolute and relative, as docs/vectors/README.md has them.
TOLERANCES = {"yes": (1e-9, 1e-9), "float32": (1e-4, 1e-5)}

Pair = dict[str, Tensor]  # the inputs of one pair, (1,) each


class Program(NamedTuple):
    name: str  # with its version
    # Loss -> function of settings and one pair; returns what the program calls it and its loss, or raises
    # NotImplementedError where it has none with these settings.
    losses: dict[str, Callable[[dict, Pair], tuple[str, Tensor]]]
    gather: Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, tokens, mask -> sums
    # Loss, a word of its row -> why its numbers differ.
    reasons: dict[tuple[str, str], str]


def averages(p: Pair) -> tuple[Tensor, Tensor]:
    """The mean log-probs of both responses."""
    return p["chosen"] / p["chosen_length"], p["rejected"] / p["rejected_length"]


def rows(program: Program) -> list[tuple[str, ...]]:
    """One row per loss and settings, in the order of the file; those that the program lacks are left out. A row
    has the loss with the settings that are not at their default, what it is called there, a cell per kind
    ("yes", "float32", or what differs), and why."""
    found = []
    for name, of_loss in groupby(VECTORS["losses"], lambda case: case["loss"]):
        groups = [list(cases) for _, cases in groupby(of_loss, lambda case: case["settings"])]
        for cases in groups if name in program.losses else ():
            defaults, settings = groups[0][0]["settings"], cases[0]["settings"]
            changed = ", ".join(f"{key} {value}" for key, value in settings.items() if value != defaults[key])
            try:
                called, cells = "", {}
                for case in cases:
                    called, cells[case["kind"]] = _of_loss(program.losses[name], case)
                found.append(_row(program, name, f"{name} {changed}".strip(), called, cells))
            except NotImplementedError:
                continue
    sums = {case["kind"]: _of_gatherer(program.gather, case) for case in VECTORS["gatherer"]}
    return [*found, _row(program, "gatherer", "sums of log-probs", "", sums)]


def table(program: Program) -> str:
    """The rows in Markdown."""
    header = (f"{program.name}: loss", "called there", *KINDS, "why")
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows(program))]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _row(program: Program, loss: str, title: str, called: str, cells: dict[str, str]) -> tuple[str, ...]:
    why = ""
    if set(cells.values()) - set(TOLERANCES):
        reasons = [why for (of, word), why in program.reasons.items() if of == loss and word in title]
        why = "; ".join(reasons) or "UNEXPLAINED"
    return (title, called, *(cells.get(kind, "") for kind in KINDS), why)


def _of_loss(loss: Callable, case: dict[str, Any]) -> tuple[str, str]:
    """What the program calls the loss, and how its numbers compare over the pairs of a case."""
    verdicts, called = [], ""
    for i, expected in enumerate(case["losses"]):
        one = {name: values[i] for name, values in case["inputs"].items()}
        pair = {
            n: torch.tensor([x], dtype=torch.float64 if type(x) is float else None) for n, x in one.items()
        }
        leaves = {name: pair[name].requires_grad_() for name in TRAINED if name in pair}
        called, value = loss(case["settings"], pair)
        gradients = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
        found = [value.sum().item()] + [gradient.item() for gradient in gradients]
        verdicts.append(_verdict(found, [expected] + [case["gradients"][name][i] for name in leaves]))
    return called, max(verdicts)[1]


def _of_gatherer(gather: Callable, case: dict[str, Any]) -> str:
    logits = torch.tensor(case["inputs"]["logits"], dtype=torch.float64).requires_grad_()
    mask = torch.tensor(case["inputs"]["response_mask"]).bool()
    sums = gather(logits, torch.tensor(case["inputs"]["tokens"]), mask)
    (gradient,) = torch.autograd.grad(sums.sum(), logits)
    expected = case["sums"] + torch.tensor(case["gradients"]["logits"]).flatten().tolist()
    return _verdict(sums.tolist() + gradient.flatten().tolist(), expected)[1]


def _verdict(found: list[float], expected: list[float]) -> tuple[float, str]:
    """How bad it is, and in words. The first number is the loss, the others are gradients."""
    both = list(zip(found, expected, strict=True))
    for level, (word, (absolute, relative)) in enumerate(TOLERANCES.items()):
        if all(abs(f - e) <= absolute + relative * abs(e) for f, e in both):
            return level, word
    errors = [abs(f - e) / (1 + abs(e)) for f, e in both]
    nans = [i for i, error in enumerate(errors) if error != error]
    worst = nans[0] if nans else errors.index(max(errors))
    f, e = both[worst]
    return 2 + (1e99 if nans else errors[worst]), f"{'gradient ' if worst else ''}{f:.4g} for {e:.4g}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        programs = [import_module(f"conform_{name}").program() for name in sys.argv[1:]]
    except ModuleNotFoundError as error:
        sys.exit(f"no module {error.name}: pip install -e '.[conformance]', and for trl '.[peers]'")
    print("\n\n".join(map(table, programs)))
