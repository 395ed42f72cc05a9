"""TRL beside the test vectors: the table in docs/conformance.md is true, and every difference is explained."""

from pathlib import Path

import pytest

pytest.importorskip("trl")
from conform_trl import program  # noqa: E402
from conformance import rows, table  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs/conformance.md").read_text()
pytestmark = pytest.mark.slow


def test_table():
    """What is printed today is what the page shows of this version of TRL."""
    printed = table(program())
    assert "UNEXPLAINED" not in printed
    assert printed in PAGE or program().name not in PAGE


def test_wrong():
    """A program that is wrong is found out: a loss that is a half too large."""
    right = program().losses["hinge"]
    wrong = program()._replace(losses={"hinge": lambda s, p: ("hinge", right(s, p)[1] + 0.5)}, reasons={})
    assert {row[-1] for row in rows(wrong)[:-1]} == {"UNEXPLAINED"}
