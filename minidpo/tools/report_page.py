"""A page for a browser that needs nothing but itself: its tags, texts side by side, charts, pairs by token.

All that is shown passes through `tag`, which escapes whatever is not Markup yet: a response that contains
<script> is text here. Style and script lie beside this file.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import numpy as np

from minidpo.files import write_file, writing
from minidpo.log import print0
from minidpo.losses import LOSSES
from minidpo.settings import keys_of
from minidpo.tools.explain_text import NUMBERS, additions, comparison, responses_of, settings

# The policy forbids the page to load anything, so it opens anywhere.
HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">"""
MOST = 800  # tokens or characters shown of one text, so that a page stays small
WIDTH, HEIGHT, LEFT, BOTTOM = 320, 160, 44, 20  # of a chart; left of and below the lines are numbers
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
    with writing(path):
        write_file(path, page.encode(errors="replace").decode())  # JSON can hold half of a character.
    print0(f"wrote {path}")


def side_by_side(prompt: str, *responses: tuple[object, ...]) -> Markup:
    """Responses below their prompt: of each a heading, and what comes below it."""
    columns = (tag("div", tag("h4", heading), *content) for heading, *content in responses)
    return tag("div", tag("h4", "prompt"), text(prompt.strip()), tag("div", *columns, class_="side"))


def text(parts: Sequence[str]) -> Markup:
    """A text of characters or of marked tokens; of a long one both ends."""
    if (left_out := len(parts) - MOST) > 0:
        between = tag("em", f" ... {left_out} left out ... ")
        parts = [*parts[: MOST // 2], between, *parts[-(MOST // 2) :]]
    return tag("p", *parts, class_="text", dir="auto")


class Line(NamedTuple):
    points: Sequence[Sequence[float]]  # x and y
    about: Sequence[str] = ()  # what the dot at each point says under the pointer; empty: there are no dots
    look: str = ""  # classes of report.css
    colour: str = "#0072B2"


def chart(title: str, good: str, lines: Sequence[Line], level: float | None = None) -> Markup:
    """good: what to look for. level: a value to compare with; drawn where it lies within the axis."""
    xs, ys = (np.array([point[axis] for line in lines for point in line.points]) for axis in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - xs.min()) / (np.ptp(xs) or 1), (y - ys.min()) / (np.ptp(ys) or 1)
        return round(LEFT + across * (WIDTH - LEFT), 1), round((1 - up) * (HEIGHT - BOTTOM), 1)

    def across(y: float, look: str) -> Markup:
        return tag("path", d=f"M{LEFT} {at(0, y)[1]}H{WIDTH}", class_=look)

    parts = [across(level, "level")] if level is not None and ys.min() < level < ys.max() else []
    for y in (ys.min(), ys.max()):
        parts += [across(y, "axis"), tag("text", f"{y:.3g}", x=LEFT - 5, y=at(0, y)[1] + 3)]
    for x in (xs.min(), xs.max()):
        parts.append(tag("text", f"{x:.3g}", x=at(x, 0)[0] + 6, y=HEIGHT - 4))
    for line in lines:
        places = [at(*point) for point in line.points]
        thinned = [*places[:: -(-len(places) // MOST_POINTS)], places[-1]]
        marks = [tag("path", d="M" + "L".join(f"{x} {y}" for x, y in thinned))]
        dots = zip(places, line.about, strict=False)
        marks += (tag("circle", tag("title", about), cx=x, cy=y, r=2.8) for (x, y), about in dots)
        parts.append(tag("g", *marks, class_=line.look, style=f"color: {line.colour}"))
    picture = tag("svg", *parts, viewBox=f"0 -12 {WIDTH + 8} {HEIGHT + 12}", role="img", aria_label=title)
    return tag("figure", tag("figcaption", tag("b", title), tag("small", good)), picture)


def token_pairs(pairs: Sequence[tuple[str, str, dict[str, Any]]]) -> Iterator[Markup]:
    """What the shades mean, and then the pairs: title, why it is shown, and what `explain` says of it."""
    moved = [abs(token["difference"]) for _, _, e in pairs for token in e["tokens"] if token["scored"]]
    most = float(f"{max(0.01, np.quantile(moved, 0.95)):.1g}")  # nats; it has the full colour
    shades = (_shaded(f"{share * most:+.3g}", share) for share in (-1, -0.5, 0.5, 1))
    about = "A token's shade is log pi - log pi_ref in nats, - less likely under pi, + likelier: "
    yield tag("p", about, *shades, ". Point at one for its numbers.", class_="legend")
    for title, why, e in pairs:
        prompt, columns, names = "", [], {True: "desirable", False: "undesirable", None: ""}
        for part, tokens in groupby(e["tokens"], key=lambda token: token["response"]):
            if part is None:
                prompt = "".join(token["characters"] for token in tokens)
            else:
                shaded = text([_token(token, most) for token in tokens])
                columns.append((names[e.get("label")] or part, shaded))
        where = f" record {e['index']} of {e['data']}" if e["data"] else " as typed"
        heading = tag("h3", title, tag("small", where))
        yield tag("article", heading, tag("p", why), side_by_side(prompt, *columns), *_calculation(e))


def _token(token: dict[str, Any], most: float) -> Markup | str:
    if not token["scored"]:
        return token["characters"]
    policy, reference, difference, so_far = (token[name] for name in (*NUMBERS[:3], NUMBERS[5]))
    about = (
        f"{token['text']!r}: policy {policy:.4f}, reference {reference:.4f}, difference {difference:+.4f};"
        f" sum so far {so_far:+.4f}"
    )
    # A part of a character that a later token completes is shown as a dot.
    characters = token["characters"].replace("\n", "↵\n") or "·"
    return _shaded(characters, difference / most, title=about)


def _shaded(content: str, share: float, **attributes: str) -> Markup:
    look = {"class_": "up" if share > 0 else "down", "style": f"--d:{min(1.0, abs(share)):.2f}"}
    return tag("span", content, **look, **attributes)


def _calculation(e: dict[str, Any]) -> Iterator[Markup]:
    """From the sums to the loss: a table, and the equation, as the loss states it and with its numbers."""
    loss, kind, names = e["loss"], LOSSES[e["loss"]["name"]], responses_of(e)
    rows: list[list[str]] = [["nats", *names, *["chosen - rejected"] * (len(names) == 2)]]
    rows.append(["|y|, scored tokens", *(str(e[f"{name}_length"]) for name in names)])
    for quantity, values in comparison(e):
        both = [*values, *(values[0] - value for value in values[1:])]
        rows.append([quantity, *(f"{value:z.4f}" for value in both)])
    weights = (f"{loss[f'{name}_weight']:+.6f}" for name in names)
    rows.append(["gradient weight, -d loss / d log pi(y|x)", *weights])
    yield tag("table", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows))

    equation = dedent((inspect.getdoc(kind) or "").split("\n\n")[1])
    sigmoid = f"    sigma(z) = {loss['sigmoid']:.4f}" if "sigmoid" in loss else ""
    result = f"loss = {loss['loss']:.4f}{additions(loss)}{sigmoid}"
    yield tag(
        "pre",
        f"{kind.name}, {settings(kind, loss) or 'no settings'}\n"
        f"{equation}\n{_filled_in(equation, e)}\n{result}",
    )


def _filled_in(equation: str, e: dict[str, Any]) -> str:
    loss, kind = e["loss"], LOSSES[e["loss"]["name"]]
    values = {r"\b[zh]\b(?! =| as)": loss["argument"], r"\bz0\b": loss.get("z0")}
    values |= {r"\be\b": loss.get("flip_rate"), r"(?<=\d)e\b": loss.get("flip_rate")}
    values |= {rf"\b{name}\b": loss[name] for name in keys_of(kind) if not isinstance(loss[name], bool)}
    for name, y in zip(responses_of(e), ("y" if kind.unpaired else "y_w", "y_l"), strict=False):
        policy, n = e[f"{name}_logps"], e[f"{name}_length"]
        ratio = (policy - e[f"reference_{name}_logps"]) / (n if loss.get("length_normalize") else 1)
        values[rf"log pi\({y}\|x\)/pi_ref\({y}\|x\)"] = ratio
        values |= {rf"log pi\({y}\|x\)": policy, rf"log P\({y}\|x\)": policy / n, rf"\|{y}\|": n}
        values[rf"log odds\({y}\)|\br{y[1:]}\b"] = loss.get(f"{name}_reward")
    for symbol, value in values.items():
        if value is not None:
            number = f"({value:.4g})" if value < 0 else f"{value:.4g}"
            equation = re.sub(symbol, f" {number} ", equation)
    # Numbers side by side are multiplied.
    equation = re.sub(r"(?<=[\d)]) +(?=[\d(])", " * ", re.sub(" +(?=[ )|])|(?<=[(]) +", "", equation))
    return re.sub(r"\((\(-[\d.e+-]+\))\)", r"\1", equation)
