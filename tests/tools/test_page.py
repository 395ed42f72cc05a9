"""`python -m minidpo explain --html`: the pair is shown as text, token by token, with the equation filled in."""

import re

import numpy as np
import pytest

from minidpo.tools import explain
from minidpo.tools.report_page import Markup, tag
from page import SCRIPT, Page

FAMILY = "👩‍👧 日本"  # no letter of it is a token of the tests' tokenizer
HEBREW = "שלום עולם"


@pytest.fixture
def typed(world, tmp_path):
    """The page of `explain --html` for a typed pair."""

    def written(chosen: str, prompt: str = "a cat", rejected: str = " no") -> Page:
        out, model = tmp_path / "pair.html", ["--model", str(world / "model"), "--device", "cpu"]
        both = ["--reference", str(world / "other"), "--prompt", prompt]
        explain.main([*model, *both, "--chosen", chosen, "--rejected", rejected, "--html", str(out)])
        return Page(out)

    return written


def test_equation(typed):
    """The equation is shown with the numbers of the pair in it, and they give the loss."""
    lines = re.findall(r"loss = (.*)", typed(" yes").text)
    log_ratios = re.findall(r"0\.1 \[ \(?(-?[\d.]+)\)? - \(?(-?[\d.]+)\)? \]", lines[1])[0]
    z = 0.1 * (float(log_ratios[0]) - float(log_ratios[1]))
    assert lines[0].startswith("-log sigma(z),    z = beta [ log pi(y_w|x)/pi_ref(y_w|x)")
    assert float(re.search(r"sigma\((-?[\d.]+)\)", lines[1])[1]) == pytest.approx(z, abs=1e-3)
    assert float(lines[2].split()[0]) == pytest.approx(np.log1p(np.exp(-z)), abs=1e-3)


def test_escaped(typed):
    """A response that contains <script>, or a prompt, is shown as text."""
    typed(f" {SCRIPT}").require_text(SCRIPT)
    typed(" yes", prompt=f"Say {SCRIPT}").require_text(SCRIPT)
    assert tag("p", "<", Markup("<b>"), title='"<') == '<p title="&quot;&lt;">&lt;<b></p>'


@pytest.mark.parametrize("response", [f" {FAMILY}", f" {HEBREW}", " a\nb"])
def test_characters(typed, response):
    """A character that is several tokens is shown once, whole, with its last token; the others are dots."""
    shown = typed(response)
    spans = re.findall(r'<span title="[^>]*>([^<]*)</span>', shown.source)
    ours = "".join(spans).partition("&lt;/s&gt;")[0].replace("·", "").replace("↵", "")
    assert ours == response
    assert [attributes["dir"] for name, attributes in shown.tags if "dir" in attributes] == ["auto"] * 3


def test_long(typed, monkeypatch):
    """Of a long text both ends are shown."""
    monkeypatch.setattr("minidpo.tools.report_page.MOST", 40)
    shown = typed(" yes" * 100 + " no")
    assert len(re.findall(r"'[^']*yes'", "".join(shown.titles))) < 40
    assert " 62 left out " in shown.text  # 101 words and EOS, of which 40 are shown
