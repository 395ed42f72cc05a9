"""The test vectors in docs/vectors are those that the command writes today."""

import json
import math
from pathlib import Path

import pytest

from minidpo.errors import UserError
from minidpo.tools.vectors import main as command
from minidpo.verify.claims import every_loss

FILE = Path(__file__).parents[2] / "docs/vectors/vectors.json"
VECTORS = json.loads(FILE.read_text())


def same(found, expected) -> bool:
    """Equal in all but the last digits of floats, which processors round differently."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-15)
    return found == expected


def test_copy(tmp_path, capsys):
    """The command writes the file that is in docs/vectors, of a modest size."""
    command(["--out", str(tmp_path / "vectors.json")])
    assert "cases" in capsys.readouterr().out
    told = "write it again: python -m minidpo vectors --out docs/vectors/vectors.json"
    assert same(json.loads((tmp_path / "vectors.json").read_text()), VECTORS), told
    assert FILE.stat().st_size < 300_000


def test_kinds():
    """Every loss is there; a case of `length 1` or `tie` is one, and sums are those by hand. (`verify` checks
    the losses of the kind `hand`.)"""
    assert {case["loss"] for case in VECTORS["losses"]} == set(every_loss())
    for case in VECTORS["losses"]:
        lengths = [x for name, x in case["inputs"].items() if name.endswith("_length")]
        if case["kind"] == "length 1":
            assert all(set(x) == {1} for x in lengths)
        if case["kind"] == "tie" and "rejected" in case["inputs"]:
            assert case["inputs"]["chosen"][0] == case["inputs"]["rejected"][0]
    # Sums of log-probs: ln 1/2 + ln 1/4 = -2.0794415417; a certain and an impossible token, 0 - 20,000.
    sums = {case["kind"]: case["sums"] for case in VECTORS["gatherer"]}
    assert sums.keys() < {case["kind"] for case in VECTORS["losses"]}
    assert sums["hand"] == pytest.approx([-2.0794415417]) and sums["extreme"] == [-20_000.0]


def test_refused(tmp_path):
    """A place that cannot be written to is one line, before the work."""
    for place in ("", tmp_path):
        with pytest.raises(UserError, match="a file in a directory that exists is needed"):
            command(["--out", str(place)])
