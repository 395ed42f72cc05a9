"""A page for a browser that needs nothing but itself: its tags, and a pair token by token.

All that is shown passes through `tag`, which escapes whatever is not Markup yet: a response that contains
<script> is text here. Style and script lie beside this file.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from typing import Any

from minidpo.files import write_file, writing
from minidpo.log import print0
from minidpo.losses import LOSSES
from minidpo.settings import keys_of
from minidpo.tools.explain_text import NUMBERS, comparison, responses_of, settings

# The policy forbids the page to load anything, so it opens anywhere, and nothing that a model wrote can run.
HEAD = """<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'unsafe-inline'">"""
# Characters that turn the direction of all that follows them are spelled out.
TURNS = {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
MOST_TOKENS = 500  # shown of one text; of a longer one both ends
MOST_CHARACTERS = 1500  # the same of a text that is not shown token by token


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """<name attribute="value">content</name>; an attribute's dash is written _, and `class` class_."""
    given = (f' {key.strip("_").replace("_", "-")}="{escape(str(v))}"' for key, v in attributes.items())
    parts = (part if isinstance(part, Markup) else escape(str(part)).translate(TURNS) for part in content)
    return Markup(f"<{name}{''.join(given)}>{''.join(parts)}</{name}>")


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    lines = [tag("tr", *(tag("th", cell) for cell in header))]
    for row in rows:
        missing = [""] * (len(header) - len(row))
        lines.append(tag("tr", *(tag("td", cell) for cell in (*row, *missing))))
    return tag("div", tag("table", *lines), class_="wide")


def side_by_side(*columns: tuple[object, ...]) -> Markup:
    """Columns, of a heading and what is below it."""
    return tag("div", *(tag("div", tag("h4", name), *content) for name, *content in columns), class_="side")


def article(title: str, prompt: str, *columns: tuple[object, ...]) -> Markup:
    """A prompt, and below it texts to compare: of each a heading, the text, and a line about it."""
    shown = ((name, content, tag("small", about)) for name, content, about in columns)
    heading = [tag("h3", title)] if title else []
    return tag("article", *heading, side_by_side(("prompt", text(prompt))), side_by_side(*shown))


def text(content: str) -> Markup:
    content = content.strip()
    left_out = len(content) - MOST_CHARACTERS
    rest = f" ... ({left_out} characters left out)" if left_out > 0 else ""
    return tag("p", content[:MOST_CHARACTERS] + rest, class_="text", dir="auto")


def write_page(path: Path, title: str, parts: Iterable[Markup]) -> None:
    """One HTML file, whole or absent."""
    style, script = (Path(__file__).with_name(f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    head = tag("head", Markup(HEAD), tag("title", title), tag("style", Markup(style)))
    body = tag("body", tag("main", tag("h1", title), *parts), tag("output"), tag("script", Markup(script)))
    page = "<!doctype html>\n" + tag("html", head, body, lang="en")
    with writing(path):
        write_file(path, page.encode(errors="replace").decode())
    print0(f"wrote {path}")


def pair_article(
    e: dict[str, Any], title: str = "", why: str = "", most: float = 0.0, tokens: int = 0
) -> Markup:
    """What `explain` says of a pair. most: the log-ratio of a token that has the full colour (0: see
    `full_colour`). tokens: how many of a text are shown (0: MOST_TOKENS)."""
    most, tokens = most or full_colour([e]), tokens or MOST_TOKENS
    parts = groupby(e["tokens"], key=lambda token: token["response"] or "prompt")
    texts = {part: _tokens(list(of_part), most, tokens) for part, of_part in parts}
    loss, kind = e["loss"], LOSSES[e["loss"]["name"]]
    names = responses_of(e)
    header = ["nats", *names, *["chosen - rejected"] * (len(names) == 2)]
    rows: list[tuple] = [("|y|, scored tokens", *(e[f"{name}_length"] for name in names))]
    for quantity, values in comparison(e):
        both = [*values, *(values[0] - value for value in values[1:])]
        rows.append((quantity, *(f"{value:z.4f}" for value in both)))
    weights = (f"{loss[f'{name}_weight']:+.6f}" for name in names)
    rows.append(("gradient weight, -d loss / d log pi(y|x)", *weights))
    where = f"record {e['index']} of {e['data']}" if e["data"] else "as typed"
    shades = [_shaded(f"{share * most:+.3g}", share) for share in (-1, -0.5, 0.5, 1)]
    legend = [
        "log pi - log pi_ref, nats: ",
        *shades[:2],
        " less likely under pi, or ",
        *shades[2:],
        " likelier",
    ]
    return tag(
        "article",
        tag("h3", title, " ", tag("small", where)),
        tag("p", why),
        side_by_side(("prompt", texts.pop("prompt"))),
        side_by_side(*texts.items()),
        tag("p", *legend, class_="legend"),
        table(header, rows),
        tag("p", f"{kind.name}, {settings(kind, loss) or 'no settings'}. {first_line(kind)}"),
        tag("pre", _equation(e)),
    )


def first_line(kind: type) -> str:
    """What a loss is, in the words of its class."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def full_colour(explanations: Iterable[dict[str, Any]]) -> float:
    """The log-ratio, to one digit, that 95 % of the tokens do not exceed."""
    sizes = sorted(abs(token["difference"]) for e in explanations for token in e["tokens"] if token["scored"])
    return float(f"{max(0.01, sizes[int(0.95 * (len(sizes) - 1))]):.1g}")


def _shaded(content: str, share: float, **attributes: str) -> Markup:
    style = f"--d:{min(1.0, abs(share)):.2f}"
    return tag("span", content, class_="up" if share > 0 else "down", style=style, **attributes)


def _tokens(of_part: list[dict[str, Any]], most: float, shown: int) -> Markup:
    first, left_out = shown // 2, max(0, len(of_part) - shown)
    content: list[str] = []
    for place, token in enumerate(of_part):
        if first <= place < first + left_out:
            if place == first:
                content.append(tag("em", f" ... {left_out} tokens left out, counted in the sums ... "))
        elif not token["scored"]:
            content += [token["characters"]] if content or token["characters"].strip() else []
        else:
            policy, reference, difference, so_far = (token[name] for name in (*NUMBERS[:3], NUMBERS[5]))
            title = (
                f"{token['text']!r}: policy {policy:.4f}, reference {reference:.4f}, difference"
                f" {difference:+.4f}; sum so far {so_far:+.4f}"
            )
            # A part of a character that the next token completes is shown as a dot.
            characters = token["characters"].replace("\n", "↵\n") or "·"
            content.append(_shaded(characters, difference / most, title=title))
    return tag("p", *content, class_="text", dir="auto")


def _equation(e: dict[str, Any]) -> str:
    """The equation of the loss as its class states it, the same with the numbers of the pair, and the
    result."""
    loss, kind = e["loss"], LOSSES[e["loss"]["name"]]
    equation = dedent((inspect.getdoc(kind) or "").split("\n\n")[1])
    values = {r"\b[zh]\b(?! =)": loss["argument"]}
    values |= {rf"\b{name}\b": loss[name] for name in keys_of(kind) if not isinstance(loss[name], bool)}
    for name, y in zip(responses_of(e), (r"\(y_w\|x\)", r"\(y_l\|x\)"), strict=False):
        policy, n = e[f"{name}_logps"], e[f"{name}_length"]
        ratio = (policy - e[f"reference_{name}_logps"]) / (n if loss.get("length_normalize") else 1)
        values = {f"log pi{y}/pi_ref{y}": ratio, f"log pi{y}": policy, rf"\|y_{y[4]}\|": n} | values
    filled = equation
    for symbol, value in values.items():
        filled = re.sub(symbol, f"({value:.4g})" if value < 0 else f"{value:.4g}", filled)
    filled = re.sub(r"\(\((.*?)\)\)", r"(\1)", re.sub(r"(?<=\d) (?=\d)", " * ", filled))
    sigmoid = f"    sigma(z) = {loss['sigmoid']:.4f}" if "sigmoid" in loss else ""
    smoothed = ", smoothed: (1-e) loss(z) + e loss(-z)" if loss.get("label_smoothing") else ""
    return f"{equation}\n{filled}\nloss = {loss['loss']:.4f}{sigmoid}{smoothed}"
