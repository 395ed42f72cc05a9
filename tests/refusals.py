"""What the losses refuse: wrong shapes, mixed dtypes and values out of range, in words that help."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from battery import Loss
from equations import LENGTHS, POLICY, REFERENCE


def value_error(function: Callable, arguments: dict, says: Iterable[str]) -> None:
    """`function(**arguments)` raises a ValueError that says all of these."""
    try:
        function(**arguments)
    except Exception as error:
        assert isinstance(error, ValueError), f"{error!r} is no ValueError"
        missing = [word for word in says if word not in str(error)]
        assert not missing, f"{str(error)!r} does not say {missing}"
    else:
        raise AssertionError(f"no ValueError that says {list(says)}")


def check_lone_length(function: Callable) -> None:
    """One length without the other is refused: half a normalisation is never what was meant."""
    logps = {name: torch.tensor([-3.0, -4.0]) for name in POLICY + REFERENCE}
    for name in LENGTHS:
        value_error(function, logps | {name: torch.tensor([2, 3])}, (*LENGTHS, "both or neither"))


def check_refusals(loss: Loss) -> None:
    """Wrong shapes, mixed dtypes and settings out of range: a ValueError with the argument and its value."""
    good = {n: t.detach() if isinstance(t, Tensor) else t for n, t in loss.tensors(loss.draw(4)).items()}
    for name in loss.inputs:
        value = good[name]
        for wrong, shape in ((value[:, None], "(4, 1)"), (value[:3], "(3,)"), (value[0], "()")):
            # The first argument sets the length: alone among lengths, it is they that do not fit.
            named = name if len(loss.inputs) > 1 or shape != "(3,)" else "lengths"
            value_error(loss.function, good | {name: wrong}, (named, shape))
        if name == "margin":  # data, not an activation: of any type
            continue
        value_error(loss.function, good | {name: good[name].long()}, (name, "int64", "floating"))
        if len(loss.inputs) > 1:
            value_error(loss.function, good | {name: good[name].float()}, (name, "float32", "float64"))
    for name in loss.lengths:
        for bad in (0, -1):
            lengths = torch.tensor([3, 1, bad, 2])
            value_error(loss.function, good | {name: lengths}, (name, str(bad), "at least 1"))
        value_error(loss.function, good | {name: torch.ones(3)}, (name, "(3,)", "(4,)"))
    out_of_range = {
        "beta": (0.0, -0.1, float("inf"), float("nan")),
        "label_smoothing": (-0.1, 0.5, 1.0, float("nan")),
    }
    for name in out_of_range.keys() & loss.settings.keys():
        for value in out_of_range[name]:
            value_error(loss.function, good | {name: value}, (name, str(value), "must be"))
