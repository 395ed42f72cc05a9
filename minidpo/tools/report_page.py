"""The parts of a page that a browser opens by itself: tags, tables, charts, and texts with shaded tokens.

All that is shown passes through `tag`, which escapes whatever is not Markup yet: a response that contains
<script> is text here. Style and script lie beside this file.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidpo.files import write_file
from minidpo.log import print0
from minidpo.tools.explain_text import calculation, equations

# The policy forbids the page to load anything, so it opens anywhere.
HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">"""
MOST = 800  # tokens or characters shown of one text, so that a page stays small
WIDTH, HEIGHT, LEFT = 320, 140, 44  # of a chart; left of and below the lines are numbers
MOST_POINTS = 200  # of a line: more cannot be seen


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """<name attribute="value">content</name>; an attribute's dash is written _, and `class` class_."""
    given = (f' {key.strip("_").replace("_", "-")}="{escape(str(v))}"' for key, v in attributes.items())
    parts = (part if isinstance(part, Markup) else escape(str(part)) for part in content)
    return Markup(f"<{name}{''.join(given)}>{''.join(parts)}</{name}>")


def write_page(path: Path, title: str, parts: Iterable[Markup]) -> None:
    """One HTML file, whole or absent."""
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    head = tag("head", Markup(HEAD), tag("title", title), tag("style", Markup(style)))
    body = tag("body", tag("main", tag("h1", title), *parts), tag("output"), tag("script", Markup(script)))
    page = "<!doctype html>\n" + tag("html", head, body, lang="en")
    write_file(path, page.encode(errors="replace").decode())  # JSON can hold half of a character.
    print0(f"wrote {path}")


def article(title: str, about: str, prompt: str, responses: dict[str, Any], *more: Markup) -> Markup:
    """A prompt, and below it responses side by side: heading -> a text of characters or of marked tokens."""
    side = tag("div", *(_text(*each) for each in responses.items()), class_="side")
    return tag("article", tag("h3", title, tag("small", about)), _text("prompt", prompt.strip()), side, *more)


def _text(heading: str, parts: Sequence[str]) -> Markup:
    """Of a long text both ends."""
    if (left_out := len(parts) - MOST) > 0:
        between = tag("em", f" ... {left_out} left out ... ")
        parts = [*parts[: MOST // 2], between, *parts[-(MOST // 2) :]]
    return tag("div", tag("h4", heading), tag("p", *parts, class_="text", dir="auto"))


class Line(NamedTuple):
    points: Any  # (n, 2): x and y
    about: str = ""  # said of a point before its x and y; empty where no point is shown
    look: str = ""  # classes of report.css
    colour: str = "#0072B2"


def chart(title: str, good: str, lines: list[Line], level: float | None = None) -> Markup:
    """good: what to look for. level: a value to compare with; drawn where it lies within the axis."""
    every = np.concatenate([line.points for line in lines])
    (left, bottom), (right, top) = every.min(axis=0), every.max(axis=0)
    rules = [Line([(left, y), (right, y)], look="axis") for y in (bottom, top)]
    if level is not None and bottom < level < top:
        rules.append(Line([(left, level), (right, level)], look="level"))
    parts = []
    for points, about, look, colour in (*rules, *lines):
        shown = np.asarray(points, float)[:: 1 + len(points) // MOST_POINTS]
        places = (shown - (left, top)) / (right - left or 1, bottom - top or -1)  # from 0 to 1, downwards
        places = (places * (WIDTH - LEFT, HEIGHT) + (LEFT, 0)).round(1)
        marks = [tag("polyline", points=" ".join(f"{x},{y}" for x, y in places))]
        for (x, y), (cx, cy) in zip(shown, places, strict=True) if about else ():
            marks.append(tag("circle", tag("title", f"{about} {x:.4g}: {y:.5g}"), cx=cx, cy=cy, r=2.8))
        parts.append(tag("g", *marks, class_=look, style=f"color: {colour}"))
    below = ((left, LEFT + 6, HEIGHT + 16), (right, WIDTH + 6, HEIGHT + 16))
    for value, x, y in ((top, LEFT - 5, 3), (bottom, LEFT - 5, HEIGHT + 3), *below):
        parts.append(tag("text", f"{value:.3g}", x=x, y=y))
    picture = tag("svg", *parts, viewBox=f"0 -12 {WIDTH + 8} {HEIGHT + 32}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", tag("b", title), tag("small", good)), picture)


def token_pairs(pairs: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Markup]:
    """What the shades mean, and then of each pair a title and what `explain` says of it."""
    moved = [abs(token["difference"]) for _, e in pairs for token in e["tokens"] if token["scored"]]
    most = float(f"{max(0.01, np.quantile(moved, 0.95)):.1g}")  # nats; it has the full colour
    about = "Blue tokens are likelier under pi than under pi_ref, orange ones less likely; the full colour is"
    yield tag("p", f"{about} a difference of {most:g} nats. Point at a token for its numbers.")
    for title, e in pairs:
        parts: dict[Any, list[str]] = {None: []}
        for token in e["tokens"]:
            shown = _shaded(token, most) if token["scored"] else token["characters"]
            parts.setdefault(token["response"], []).append(shown)
        prompt = "".join(parts.pop(None))
        if e["label"] is not None:  # of the one response
            parts = {"desirable" if e["label"] else "undesirable": parts["chosen"]}
        where = f"record {e['index']} of {e['data']}" if e["data"] else "as typed"
        table = tag("table", *(tag("tr", *(tag("td", cell) for cell in row)) for row in calculation(e)))
        yield article(title, where, prompt, parts, tag("pre", equations(e)), table)


def _shaded(token: dict[str, Any], most: float) -> Markup:
    numbers = "policy {policy_logp:.4f}, reference {reference_logp:.4f}, difference {difference:+.4f}"
    about = ("{text!r}: " + numbers + "; sum so far {difference_sum:+.4f}").format(**token)
    # A part of a character that a later token completes is shown as a dot.
    text, share = token["characters"].replace("\n", "↵\n") or "·", token["difference"] / most
    look = {"class_": "up" if share > 0 else "down", "style": f"--d:{min(1.0, abs(share)):.2f}"}
    return tag("span", text, title=about, **look)
