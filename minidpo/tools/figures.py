"""How minidpo's figures look, and how they are written: each file is complete or not there."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minidpo.errors import UserError
from minidpo.files import replacing_file, writing

# Okabe & Ito 2008: colours that can be told apart with any colour vision, yellow last because it is faint on
# paper. Each colour has a mark of its own, for printing in grey.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000 #999999 #F0E442".split()
MARKS = "osD^vPX<*"
INK = "#222222"

STYLE: dict[Any, Any] = {  # matplotlib's type for a key is the list of all its keys
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#DDDDDD",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "minidpo",  # Without it the same figure would have other bytes each time.
}


def require_matplotlib(what: str) -> None:
    """Raises UserError that names the extra if matplotlib, which `what` needs, is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(f"{what} needs matplotlib: pip install -e '.[plot]'") from None


def png_and_svg(typed: str | Path) -> list[Path]:
    """NAME.png and NAME.svg. NAME may be typed with one of these suffixes; any other dot is part of it."""
    name = str(typed).removesuffix(".png").removesuffix(".svg")
    return [Path(f"{name}.png"), Path(f"{name}.svg")]


@contextmanager
def drawing(files: list[Path], width: float, height: float) -> Iterator[Any]:
    """Yield an empty figure, width x height in inches; when the block ends well, write it to each of `files`.

    The format of a file is its suffix: .png or .svg.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        # Figure instead of pyplot: no screen is needed, and there is no global state.
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for file in files:
            # The date would make the bytes of equal figures differ.
            undated = {"Date": None} if file.suffix == ".svg" else None
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing_file(file) as temporary:
                    figure.savefig(temporary, format=file.suffix[1:], dpi=160, metadata=undated)
