"""What `score` prints of margins: accuracy, baselines, calibration."""

from collections.abc import Iterator

import numpy as np

from minidpo.training.reward_scorer import with_error

BINS = 10  # of predicted probabilities, from 0.5 to 1


def calibration(margins: np.ndarray) -> tuple[list[tuple[float, int, float, float]], float]:
    """How often a model is right when it is as sure as it is: a reliability table, and its summary.

        predicted = sigma(|margin|)    probability that the model gives to the response it ranks higher
        observed  = share of pairs in which that is the chosen one; a margin of 0 counts one half
        ECE       = sum over bins of n / N * |mean observed - mean predicted|

    Of sigma(margin) itself nothing could be observed, because chosen is the preferred response of every pair.
    margins (N,), in units of a logit. Returns the bins that hold pairs, (lower edge, n, mean predicted,
    observed), and the expected calibration error.
    """
    predicted = 1 / (1 + np.exp(-np.abs(margins)))
    right = (np.sign(margins) + 1) / 2
    bins = np.minimum(((predicted - 0.5) * 2 * BINS).astype(int), BINS - 1)
    table = []
    for b in np.unique(bins).tolist():
        held = bins == b
        means = float(predicted[held].mean()), float(right[held].mean())
        table.append((0.5 + b / (2 * BINS), int(held.sum()), *means))
    error = sum(n * abs(observed - mean) for _, n, mean, observed in table) / len(margins)
    return table, error


def summary(
    margins: np.ndarray, meaning: str, lengths: np.ndarray, groups: np.ndarray | None, are_logits: bool
) -> Iterator[str]:
    """The printed lines. margins (N,), and in words what they are; lengths (N, 2): tokens of both responses;
    groups (N,) as `groups_of` gives them; are_logits: whether sigma(margin) is a probability."""
    margins = margins.astype(np.float64)
    yield f"margin: {meaning}"
    yield f"  {'':<28}{'pairs':>7}   {'accuracy':<16} mean margin"
    rows = [("all", margins)]
    if groups is not None:
        rows += [(name, margins[groups == name]) for name in sorted(set(groups.tolist()))]
    for name, of_row in rows:
        yield f"  {name[:28]:<28}{_share(of_row > 0)}    {with_error(of_row, '8.4f')}"
    if ties := int((margins == 0).sum()):
        yield f"  ({ties} margins are 0 and count as wrong)"
    longer = (np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2
    ties = int((longer == 0.5).sum())
    yield f"  {'baseline: longer response':<28}{_share(longer)}    {ties} ties, each counted as half"
    yield f"  {'baseline: a coin':<28}{'':>7}   0.500"
    if not are_logits:
        return
    table, error = calibration(margins)
    yield "calibration: of choices predicted right with probability sigmoid(|margin|), the share that is"
    yield f"  {'between':<14}{'pairs':>7}{'predicted':>12}{'observed':>12}"
    for low, n, predicted, observed in table:
        between = f"{low:.2f} and {low + 0.5 / BINS:.2f}"
        yield f"  {between:<14}{n:>7}{predicted:>12.3f}{observed:>12.3f}"
    yield f"  expected calibration error {error:.3f}"


def _share(right: np.ndarray) -> str:
    return f"{len(right):>7}   {with_error(right, '.3f'):<13}"
