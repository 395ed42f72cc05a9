"""Tables of the commands, as text."""

from collections.abc import Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]], width: int = 8) -> str:
    """One line per row: the first column is aligned left, the others right and at least `width` wide.

    A row may end before the others do.
    """
    first, *others = zip_longest(*rows, fillvalue="")
    columns = [[cell.ljust(max(map(len, first))) for cell in first]]
    columns += [[cell.rjust(max(width, *map(len, column))) for cell in column] for column in others]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))
