"""`python -m minidpo report` and `explain --html`: a page that says what other commands say, and only shows text."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from minidpo.errors import UserError
from minidpo.tools import explain, report, score
from minidpo.tools.report_page import Markup, tag
from minidpo.tools.report_pairs import to_teach
from record_files import read, write
from runs import run_dpo, run_rm

SCRIPT = "<script>alert('1')</script>\" onload='x' &amp;"
FAMILY = "👩‍👧 日本"  # no letter of it is a token of the tests' tokenizer
HEBREW = "שלום עולם"


class Page(HTMLParser):
    """What a browser makes of a page: its tags, the text between them, and the titles of tokens and marks."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self._open, self.titles = "", "", []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag
        if tag == "span" and "title" in dict(attributes):
            self.titles.append(dict(attributes)["title"])

    def handle_data(self, data):
        if self._open == "title":
            self.titles.append(data)
        elif self._open not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A directory with the runs dpo, with samples and checkpoints, and rm."""
    out = tmp_path_factory.mktemp("runs")
    keys = {"model.path": world / "model", "data.train": world / "pairs.jsonl.gz", "data.eval_pairs": 12}
    keys |= {"data.max_length": 64, "data.max_prompt_length": 40, "optim.lr": 1e-2, "optim.max_steps": 6}
    keys |= {"optim.batch_size": 4, "run.dtype": "fp32", "run.device": "cpu", "run.log_every": 1}
    (out / "empty.toml").write_text("")
    common = [str(out / "empty.toml"), *(f"--{key}={value}" for key, value in keys.items())]
    run_rm(common, f"--run.out={out / 'rm'}")
    samples = ["--eval.samples=5", "--eval.max_new_tokens=6", f"--eval.reward_model={out / 'rm/final'}"]
    run_dpo(common, f"--run.out={out / 'dpo'}", "--run.eval_every=2", "--run.save_every=2", *samples)
    return out


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """A copy of those runs, to be spoilt by a test."""
    shutil.copytree(trained, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


@pytest.fixture
def page(tmp_path):
    """The page that `report` writes."""

    def written(*arguments: object) -> Page:
        out = tmp_path / "page.html"
        report.main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
        return Page(out)

    return written


@pytest.fixture
def typed(world, tmp_path):
    """The page of `explain --html` for a typed pair."""

    def written(chosen: str, prompt: str = "a cat", rejected: str = " no") -> Page:
        out, model = tmp_path / "pair.html", ["--model", str(world / "model"), "--device", "cpu"]
        both = ["--reference", str(world / "other"), "--prompt", prompt]
        explain.main([*model, *both, "--chosen", chosen, "--rejected", rejected, "--html", str(out)])
        return Page(out)

    return written


def test_figures_of_explain(trained, world, page, capsys):
    """Every figure of a pair is that of `explain --json` for the same record: tokens, sums, loss, weights."""
    shown = page(trained / "dpo")
    articles = re.findall(r"<article>.*?</article>", shown.source, re.DOTALL)
    records = [int(re.search(r"record (\d+) of", article)[1]) for article in articles if "record" in article]
    assert len(records) >= 3
    gains = []
    for index, article in zip(records, articles, strict=False):
        capsys.readouterr()
        where = ["--data", str(world / "pairs.jsonl.gz"), "--index", str(index), "--device", "cpu"]
        explain.main(
            ["--model", str(trained / "dpo/final"), "--reference", str(world / "model"), "--json", *where]
        )
        e = json.loads(capsys.readouterr().out)
        tokens = [token for token in e["tokens"] if token["scored"]]
        titles = re.findall(r'title="[^"]*: policy ([^,]*), reference ([^,]*), difference ([^;]*);', article)
        names = ("policy_logp", "reference_logp")
        expected = [
            tuple(f"{token[n]:.4f}" for n in names) + (f"{token['difference']:+.4f}",) for token in tokens
        ]
        assert titles == expected
        for prefix in ("", "reference_"):
            chosen, rejected = e[f"{prefix}chosen_logps"], e[f"{prefix}rejected_logps"]
            row = (f"<td>{value:z.4f}</td>" for value in (chosen, rejected, chosen - rejected))
            assert "".join(row) in article
        loss = e["loss"]
        assert f"<td>{loss['chosen_reward']:z.4f}</td><td>{loss['rejected_reward']:z.4f}</td>" in article
        assert f"<td>{loss['chosen_weight']:+.6f}</td><td>{loss['rejected_weight']:+.6f}</td>" in article
        assert f"loss = {loss['loss']:.4f}    sigma(z) = {loss['sigmoid']:.4f}" in article
        gains.append(loss["margin"])
    largest_gain, largest_loss, *others = gains
    assert largest_gain == max(gains) and largest_loss == min(gains) < min(others)


def test_equation(typed):
    """The equation is shown with the numbers of the pair in it, and they give the loss."""
    lines = re.findall(r"loss = (.*)", typed(" yes").text)
    log_ratios = re.findall(r"0\.1 \[ \(?(-?[\d.]+)\)? - \(?(-?[\d.]+)\)? \]", lines[1])[0]
    z = 0.1 * (float(log_ratios[0]) - float(log_ratios[1]))
    assert lines[0].startswith("-log sigma(z),    z = beta [ log pi(y_w|x)/pi_ref(y_w|x)")
    assert float(re.search(r"sigma\((-?[\d.]+)\)", lines[1])[1]) == pytest.approx(z, abs=1e-3)
    assert float(lines[2].split()[0]) == pytest.approx(np.log1p(np.exp(-z)), abs=1e-3)


def test_to_teach():
    """By hand: row 3 gained most, 0 lost most, 2 is the median; 1 lost, and the reference is against it too.
    It is against 4 as well, but training mended that."""
    picked = to_teach(np.array([-5.0, -1.0, 0.5, 9.0, 2.0]), np.array([-9.0, -2.0, -3.0, 1.0, -8.0]))
    titles = {title: row for (title, _), row in picked.items()}
    assert titles == {"Largest gain": 3, "Largest loss": 0, "Typical": 2, "Looks mislabelled": 1}
    assert list(to_teach(np.array([1.0]), np.array([-1.0])).values()) == [0]


@pytest.mark.parametrize("where", ["response", "prompt", "samples", "names"])
def test_escaped(typed, page, runs, where):
    """What somebody else wrote is text wherever it is shown: no tag and no attribute of the page comes of it."""
    if where == "response":
        shown = typed(f" {SCRIPT}")
    elif where == "prompt":
        shown = typed(" yes", prompt=f"Say {SCRIPT}")
    elif where == "samples":
        for file in (runs / "dpo/samples").iterdir():
            write(file, *(row | {"prompt": SCRIPT, "response": SCRIPT} for row in read(file)[:1]))
        shown = page(runs / "dpo")
    else:
        (runs / "dpo").rename(runs / "<b onclick=1>")
        shown = page(runs / "<b onclick=1>", runs / "rm")
    wanted = "<b onclick=1>" if where == "names" else SCRIPT
    assert wanted in shown.text
    names = {name for name, _ in shown.tags}
    assert [name for name, _ in shown.tags].count("script") == 1 and not names & {
        "img",
        "iframe",
        "link",
        "a",
    }
    assert not [key for _, attributes in shown.tags for key in attributes if key.startswith("on")]
    assert tag("p", "<", Markup("<b>"), title='"<') == '<p title="&quot;&lt;">&lt;<b></p>'


def test_alone(page, trained):
    """The page loads nothing: it names no address, and its policy forbids any."""
    shown = page(trained / "dpo", trained / "rm")
    assert not re.search(r"https?:|@import|url\(|\b(src|href)=", shown.source)
    assert "default-src 'none'" in shown.source and len(shown.source.encode()) < 3e6


@pytest.mark.parametrize("response", [f" {FAMILY}", f" {HEBREW}", " a\nb"])
def test_characters(typed, response):
    """A character that is several tokens is shown once, whole, with its last token; the others are dots."""
    shown = typed(response)
    spans = re.findall(r'<span [^>]*title="[^"]*">([^<]*)</span>', shown.source)
    ours = "".join(spans).partition("&lt;/s&gt;")[0].replace("·", "").replace("↵", "")
    assert ours == response
    assert [attributes["dir"] for name, attributes in shown.tags if "dir" in attributes] == ["auto"] * 3


def test_long(page, runs, typed, monkeypatch):
    """Of a long text both ends are shown; the page stays small."""
    monkeypatch.setattr("minidpo.tools.report_page.MOST", 40)
    shown = typed(" yes" * 100 + " no")
    assert len(re.findall(r"'[^']*yes'", "".join(shown.titles))) < 40
    assert " 62 left out " in shown.text  # 101 words and EOS, of which 40 are shown
    file = max((runs / "dpo/samples").iterdir(), key=lambda path: int(path.stem[5:]))
    write(file, *(row | {"response": "word " * 10**5} for row in read(file)))
    assert len(page(runs / "dpo").source) < 3e5


def test_in_words(trained, page):
    """The first paragraph says what was trained, on what, how long, with which result, and what was warned of."""
    first, *_, last = [line for line in read(trained / "dpo/metrics.jsonl") if "eval/loss" in line]
    said = page(trained / "dpo").text.partition("Curves")[0]
    for text in (
        "Its loss is dpo, -log sigma(z), with beta 0.1.",
        "It made 6 steps of 4 pairs, 0.86 epochs of pairs.jsonl.gz",  # 24 of the 28 pairs not held out
        f"step 0 → 6, loss 0.6931 → {last['eval/loss']:.4f}",
        f"KL 0.00 → {last['eval/kl']:.2f}",
    ):
        assert text in said, said


def test_warnings(trained, config, tmp_path, page, capsys):
    """The advice is what the run has printed."""
    run_dpo(config(optim__lr=0.3, optim__max_steps=8, run__eval_every=2))
    printed = re.findall("^warning: (.*)", capsys.readouterr().out, re.M)
    said = page(tmp_path / "out").text.partition("Curves")[0]
    assert printed and all(f"Warning: {warning}." in said for warning in printed)
    assert "There is nothing to warn of." not in said


def test_curves(trained, page):
    """Every held-out value is a dot that says it; two runs are told apart, and what is constant is no chart."""
    shown = page(trained / "dpo", trained / "rm")
    lines = read(trained / "dpo/metrics.jsonl")
    for line in lines:
        if "eval/loss" in line:
            assert f"dpo, step {line['step']}: loss {line['eval/loss']:.5g}" in shown.titles
    assert [
        text for name in ("dpo", "rm") for text in re.findall(f"<button[^>]*>({name})<", shown.source)
    ] == ["dpo", "rm"]
    alone = page(trained / "rm")
    assert "<button" not in alone.source and "Mean reward, nats" in alone.text


def test_samples(trained, page):
    """The first and the last response to a prompt, each with KL, reward and length."""
    shown = page(trained / "dpo").text.split("samples before and after")[1]
    for step in (0, 6):
        for row in read(trained / f"dpo/samples/step-{step}.jsonl"):
            about = f"KL {row['kl']:.2f} nats, reward {row['reward']:.3f}, {row['tokens']} tokens"
            assert about in shown and row["response"].strip() in shown


def test_reward_model(trained, world, page, tmp_path):
    """Margins and accuracy are those of `score`, and the pairs shown have the largest and smallest margins."""
    shown, out = page(trained / "rm"), tmp_path / "scores.jsonl"
    data = ["--data", str(world / "pairs.jsonl.gz"), "--out", str(out), "--device", "cpu"]
    score.main(["--reward-model", str(trained / "rm/final"), *data])
    rows = {row["index"]: row["chosen_reward"] - row["rejected_reward"] for row in read(out)}
    found = re.findall(r"(Most \w+): margin (\S+), record (\d+) of", shown.text)
    assert [title for title, _, _ in found] == ["Most sure"] * 2 + ["Most wrong"] * 2
    margins = [float(margin) for _, margin, _ in found]
    for margin, (_, _, index) in zip(margins, found, strict=True):
        assert margin == pytest.approx(rows[int(index)], abs=2e-4)
    assert margins[0] >= margins[1] and margins[2] <= margins[3] <= margins[1]
    last = read(trained / "rm/metrics.jsonl")[-1]
    assert f"right of 0 is right: accuracy {last['eval/accuracy']:.3f}" in shown.text


TURNS = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "no"}]
TURNS += [{"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("record", "settings", "says"),
    [
        ({"completion": " yes", "label": True}, {"loss__name": '"kto"'}, "<h4>desirable</h4>"),
        ({"chosen": " yes", "rejected": " no"}, {"loss__name": '"kto"'}, "<h4>undesirable</h4>"),
        ({"completion": " yes"}, {"loss__name": '"sft"'}, "loss = -log pi(y_w|x) / |y_w|"),
        ({"chosen": " yes", "rejected": " no"}, {"lora__rank": 2}, ", with adapters)"),
        (
            {"chosen": TURNS, "rejected": TURNS[:1]},
            {"data__template": '"hh"'},
            "</span>\n\nHuman: no\n\nAssistant:<",
        ),
    ],
)
def test_kinds(config, tmp_path, page, record, settings, says):
    """Runs of other losses and data have pairs too, also where adapters alone are saved yet; what others said in a
    response is not shaded."""
    rows = [{"prompt": f"{word}?", **record} for word in ("cat", "dog", "it")]
    if "label" in record:
        rows[0]["label"] = False
    if "data__template" in settings:
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    data = {"data__eval": [str(write(tmp_path / "a.jsonl", *rows))], "data__eval_pairs": 0}
    data |= {
        "data__train": data["data__eval"],
        "optim__max_steps": 1,
        "run__eval_every": 1,
        "optim__batch_size": 2,
    }
    run_dpo(config(**data | settings, run__save_every=1))
    shown = page(tmp_path / "out")
    assert says in shown.source and "Largest gain" in shown.text
    figures = re.findall(r"loss = \S+", shown.text)
    shutil.rmtree(tmp_path / "out/final")
    again = page(tmp_path / "out")
    assert "not finished" in again.text and re.findall(r"loss = \S+", again.text) == figures


def spoil(run: Path, what: str) -> None:
    if what == "final":
        shutil.rmtree(run / "final")
    elif what == "model":
        shutil.rmtree(run / "final")
        shutil.rmtree(run / "checkpoints")
    elif what == "samples":
        shutil.rmtree(run / "samples")
    elif what == "metrics":
        (run / "metrics.jsonl").write_text("")
    else:
        file = run / "config.toml"
        file.write_text(re.sub(*what, file.read_text()))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("final", "It is not finished: there is no final/."),
        ("final", "Model: {RUN}/checkpoints/step-6."),
        ("model", "No pairs are shown: there is no model yet"),
        ("samples", "No samples are shown: the run wrote none"),
        ("metrics", "It made 0 steps"),
        ("metrics", "nothing that changes was logged"),
        ((r"eval_pairs = \d+", "eval_pairs = 0"), "No pairs are shown: the run holds out none"),
        ((r'train = \[".*"\]', 'train = ["gone.jsonl"]'), "No pairs are shown: gone.jsonl: No such file"),
        ((r'path = ".*model"', 'path = "gone"'), "No pairs are shown: gone/config.json: no such file"),
        ((r'(?s)name = "dpo".*?\n\n', 'name = "simpo"\n\n'), "which the loss simpo does not read"),
        ((r'(?s)name = "dpo".*?\n\n', 'name = "sft"\n\n'), "loss = -log pi(y_w|x) / |y_w|"),
    ],
)
def test_incomplete(runs, page, what, says):
    """A run that lacks something is shown as far as it goes, and the page says what is missing."""
    spoil(runs / "dpo", what)
    shown = page(runs / "dpo")
    assert says.format(RUN=runs / "dpo") in shown.text and "All settings" in shown.text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere/metrics.jsonl: no such file; report takes directories of runs"),
        (["RUN/final"], "not the final/ in it"),
        (["RUN", "--out", "nowhere/a.html"], "--out nowhere/a.html: a file in a directory that exists"),
        (["RUN", "--out", "."], "--out .: a file in a directory that exists"),
        (["RUN"] * 10, "10 runs; at most 9"),
    ],
)
def test_refused(trained, tmp_path, monkeypatch, arguments, says):
    """Bad input is one line, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        report.main([argument.replace("RUN", str(trained / "dpo")) for argument in arguments])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: nobody has opened the page")
def test_browser(trained, page, tmp_path):
    """A real browser opens the page without a complaint; tokens have their numbers, and its script has run."""
    shown = page(trained / "dpo", trained / "rm")
    # What the script does is seen by a press on the first button, which hides the curves of a run.
    file = tmp_path / "pressed.html"
    press = 'document.querySelector("button").click();</script></body>'
    file.write_text(shown.source.replace("</script></body>", press), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom"]
    ran = subprocess.run([BROWSER, *options, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "CONSOLE" not in ran.stderr, ran.stderr
    titles = re.findall(r'title="([^"]*difference [^"]*)"', ran.stdout)
    assert len(titles) == len([title for title in shown.titles if "difference" in title]) > 30
    assert 'class="off"' in ran.stdout and "display: none;" in ran.stdout
