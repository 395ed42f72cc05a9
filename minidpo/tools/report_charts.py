"""Charts as inline SVG: axes with few ticks, and on them lines, dots and bars that say their values."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from minidpo.tools.report_page import Markup, tag

WIDTH, HEIGHT, LEFT, BOTTOM = 320, 170, 44, 20
MOST_POINTS = 200  # of a line: more cannot be seen, and a page should stay small


class Marks(NamedTuple):
    kind: str  # line, dots or bars
    points: Sequence[tuple[float, float]]
    look: str = ""  # classes of report.css
    about: Sequence[str] = ()  # what each dot or bar says under the pointer


def chart(title: str, about: str, marks: Sequence[Marks], level: float | None = None) -> Markup:
    """level: a value to compare with; drawn where it lies within the axis."""
    xs, ys = ([point[axis] for mark in marks for point in mark.points] for axis in (0, 1))
    bar = 0.0  # the width of a bar; bars begin at 0 and have one distance
    for mark in marks:
        if mark.kind == "bars":
            bar = mark.points[1][0] - mark.points[0][0]
    if bar:
        xs, ys = [min(xs) - bar / 2, max(xs) + bar / 2], [*ys, 0.0]
    left, right = _span(xs)
    low, high = _span(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return round(LEFT + across * (WIDTH - LEFT), 1), round((1 - up) * (HEIGHT - BOTTOM), 1)

    def across(y: float, look: str) -> Markup:
        return tag("path", d=f"M{LEFT} {at(left, y)[1]}H{WIDTH}", class_=look)

    parts = []
    for y in _ticks(low, high):
        parts += [across(y, "grid"), tag("text", f"{y:g}", x=LEFT - 5, y=at(left, y)[1] + 3, class_="y")]
    parts += (tag("text", f"{x:g}", x=at(x, low)[0], y=HEIGHT - 4) for x in _ticks(left, right))
    if level is not None and low <= level <= high:
        parts.append(across(level, "level"))
    for mark in marks:
        places = [at(*point) for point in mark.points]
        if mark.kind == "line":
            every = -(-len(places) // MOST_POINTS)
            thinned = [*places[:-1:every], *places[-1:]]
            parts.append(tag("path", d="M" + "L".join(f"{x} {y}" for x, y in thinned), class_=mark.look))
            continue
        width = 0.9 * bar / (right - left) * (WIDTH - LEFT)
        for (x, y), said in zip(places, mark.about, strict=True):
            if mark.kind == "dots":
                shape = tag("circle", tag("title", said), cx=x, cy=y, r=2.8, class_=mark.look)
            else:
                top, size = min(y, at(0, 0)[1]), abs(y - at(0, 0)[1])
                place = {"x": round(x - width / 2, 1), "y": top, "width": round(width, 1), "height": size}
                shape = tag("rect", tag("title", said), class_=mark.look, **place)
            parts.append(shape)
    picture = tag("svg", *parts, viewBox=f"0 -6 {WIDTH + 6} {HEIGHT + 6}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", tag("b", title), tag("span", about)), picture)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis: those of the values, and a little room."""
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or abs(low) / 10 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Up to seven round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 6)
    return [float(f"{n * step:.9g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
