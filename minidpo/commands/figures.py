"""How minidpo's figures look, and how they come to disk, each file whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidpo.errors import UserError
from minidpo.files import replacing_file, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008, told apart with any colour vision; yellow last, for it is faint on paper. Marks differ too, for
# printing in grey.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442",
)  # fmt: skip
MARKS = "osD^vPX<*"
INK, FAINT = "#222222", "#DDDDDD"

STYLE: dict[Any, Any] = {  # matplotlib's type for a key is the list of all its keys
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "svg.hashsalt": "minidpo",  # else the same figure has other bytes each time
}


def require_matplotlib(what: str) -> None:
    """UserError that names the extra where matplotlib is not there; `what` needs it. Ask before minutes of work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"{what} needs matplotlib: pip install -e '.[plot]'") from None


def png_and_svg(typed: str | Path) -> list[Path]:
    """NAME.png and NAME.svg; an ending of theirs that was typed is no part of the name, another dot is."""
    name = Path(typed)
    name = name.with_suffix("") if name.suffix in (".png", ".svg") else name
    return [Path(f"{name}.png"), Path(f"{name}.svg")]


@contextmanager
def drawing(files: list[Path], width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure, width x height in inches; when the block ends well, write it to each of `files`.

    Their endings say the format: png, svg or pdf.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(width, height), layout="constrained"
        )  # no pyplot: no screen, no global state
        yield figure
        for file in files:
            kind = file.suffix[1:]
            undated = {} if kind == "png" else {"CreationDate" if kind == "pdf" else "Date": None}
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing_file(file) as temporary:
                    figure.savefig(temporary, format=kind, dpi=160, metadata=undated)


def label_points(
    figure: Figure, axes: Axes, points: list[tuple[float, float, str, str]], others: list[tuple[float, float]]
) -> None:
    """Write each text beside its point, (x, y, text, colour), where it covers no point, none of `others`, no text.

    Ask for it last: it needs the axes as they will be. Where nothing is free a text stands to the upper right.
    """
    figure.draw_without_rendering()
    pixels = figure.dpi / 72  # of one point of text: all below is in points

    def box(at: tuple[float, float], left: float, low: float, right: float, high: float) -> tuple[float, ...]:
        x, y = axes.transData.transform(at) / pixels
        return x + left, y + low, x + right, y + high

    taken = [box(point[:2], -6, -6, 6, 6) for point in points] + [
        box(other, -2, -2, 2, 2) for other in others
    ]
    for x, y, text, colour in points:
        width, height = 5.5 * len(text), 9
        left, middle = -7 - width, -width / 2
        places: tuple[tuple[float, float], ...] = (
            (7, 5),
            (left, 5),
            (7, -12),
            (left, -12),
            (middle, 10),
            (middle, -18),
            (middle, 20),
        )
        boxes = {place: box((x, y), *place, place[0] + width, place[1] + height) for place in places}
        free = [place for place in places if not any(overlap(boxes[place], other) for other in taken)]
        place = (free or places)[0]
        taken.append(boxes[place])
        axes.annotate(text, (x, y), place, textcoords="offset points", color=colour)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Boxes (left, low, right, high)."""
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))
