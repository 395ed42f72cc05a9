"""What `score` says of a whole preference set: accuracy, margins, two baselines on the same pairs, calibration.

accuracy       share of pairs whose margin is > 0: strict, as in training, so a model that cannot tell has 0
a +- b         a mean and its standard error sqrt(variance / n); of an accuracy p that is sqrt(p (1 - p) / n)
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from minidpo.errors import UserError
from minidpo.formats import BadRecord
from minidpo.judge import mean_and_error
from minidpo.records import read_records

MOST_GROUPS = 50
BINS = 10  # of predicted probabilities, from 0.5 to 1
WITHOUT = "(none)"


def groups_of(path: Path, field: str, index: np.ndarray) -> np.ndarray:
    """What the records at `index` (their places in the file, rising) hold under `field`, as text: (pairs,).

    Raises UserError where none of them has the field, or where so many values differ that it names no groups.
    """
    wanted, values = set(index.tolist()), []
    for place, (_, record) in enumerate(read_records(path)):
        if place in wanted and not isinstance(record, BadRecord):  # a bad one is in no pair
            value = record.get(field, WITHOUT)
            values.append(value if isinstance(value, str) else json.dumps(value))
    different = set(values)
    if different == {WITHOUT}:
        raise UserError(f"--by {field}: no scored record of {path} has such a field")
    if len(different) > MOST_GROUPS:
        raise UserError(
            f"--by {field}: {len(different)} different values; a field with at most {MOST_GROUPS} is needed"
        )
    return np.array(values)


def calibration(margins: np.ndarray) -> tuple[list[tuple[float, int, float, float]], float]:
    """How often a model is right when it is as sure as it is: a reliability table, and what it comes to.

        predicted = sigma(|margin|)    probability that the model gives to the ending it ranks higher
        observed  = share of pairs in which that is the chosen one; a margin of 0 counts one half
        ECE       = sum over bins of n / N * |mean observed - mean predicted|

    Of sigma(margin) itself nothing could be observed: chosen is the preferred ending of every pair.
    margins (N,), in units of a logit. Returns the bins that hold pairs, (lower edge, n, mean predicted, observed),
    and the expected calibration error.
    """
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    right = (np.sign(margins) + 1) / 2
    bins = np.minimum(((predicted - 0.5) * 2 * BINS).astype(int), BINS - 1)
    table = []
    for b in np.unique(bins):
        held = bins == b
        table.append(
            (0.5 + b / (2 * BINS), int(held.sum()), float(predicted[held].mean()), float(right[held].mean()))
        )
    error = sum(n * abs(observed - mean) for _, n, mean, observed in table) / len(margins)
    return table, error


def summary(
    margins: np.ndarray, meaning: str, lengths: np.ndarray, groups: np.ndarray | None, are_logits: bool
) -> Iterator[str]:
    """The printed lines. margins (N,), and in words what they are; lengths (N, 2): tokens of chosen and rejected;
    groups (N,) as `groups_of` gives them; are_logits: whether sigma(margin) is a probability to be calibrated."""
    margins = margins.astype(np.float64)
    yield f"margin: {meaning}"
    yield f"  {'':<28}{'pairs':>7}   {'accuracy':<16} mean margin"
    every = np.ones(len(margins), bool)
    rows = [("all", every)]
    if groups is not None:
        rows += [(name, groups == name) for name in sorted(set(groups.tolist()))]
    for name, held in rows:
        accuracy, margin = mean_and_error(margins[held] > 0), mean_and_error(margins[held])
        yield (
            f"  {name[:28]:<28}{held.sum():>7}   {accuracy[0]:.3f} ± {accuracy[1]:.3f}    {margin[0]:>8.4f} ± {margin[1]:.4f}"
        )
    if ties := int((margins == 0).sum()):
        yield f"  ({ties} margins are 0 and count as wrong)"
    longer = (np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2
    ties = int((longer == 0.5).sum())
    accuracy = mean_and_error(longer)
    yield (
        f"  {'baseline: longer ending':<28}{len(longer):>7}   {accuracy[0]:.3f} ± {accuracy[1]:.3f}"
        f"    {ties} ties, each counted as half"
    )
    yield f"  {'baseline: a coin':<28}{'':>7}   0.500"
    if are_logits:
        yield from _calibration_lines(margins)


def _calibration_lines(margins: np.ndarray) -> Iterator[str]:
    table, error = calibration(margins)
    yield "calibration: of choices predicted right with probability sigmoid(|margin|), the share that is"
    yield f"  {'between':<14}{'pairs':>7}{'predicted':>12}{'observed':>12}"
    for low, n, predicted, observed in table:
        between = f"{low:.2f} and {low + 0.5 / BINS:.2f}"
        yield f"  {between:<14}{n:>7}{predicted:>12.3f}{observed:>12.3f}"
    yield f"  expected calibration error {error:.3f}"
