"""`python -m minidpo report`: a page that says what other commands say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from minidpo.tools import explain, report, score
from minidpo.tools.report import by_groups, to_teach
from page import SCRIPT, Page
from record_files import read, write
from runs import run_dpo, run_rm


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


def test_figures_of_explain(trained, world, page, capsys):
    """Every figure of a pair is that of `explain --json` for the same record: tokens, sums, loss, weights."""
    articles = re.findall(r"<article>.*?</article>", page(trained / "dpo").source, re.DOTALL)
    gains = []
    for article in (article for article in articles if "record" in article):
        capsys.readouterr()
        index = re.search(r"record (\d+) of", article)[1]
        where = ["--data", str(world / "pairs.jsonl.gz"), "--index", index, "--device", "cpu", "--json"]
        models = ["--model", str(trained / "dpo/final"), "--reference", str(world / "model")]
        explain.main([*models, *where])
        e = json.loads(capsys.readouterr().out)
        loss, numbers = e["loss"], "policy {policy_logp:.4f}, reference {reference_logp:.4f}, difference"
        expected = [numbers.format(**token) for token in e["tokens"] if token["scored"]]
        assert re.findall(r'title="[^"]*: (policy .*? difference) ', article) == expected
        shades = ["up" if token["difference"] > 0 else "down" for token in e["tokens"] if token["scored"]]
        assert re.findall(r'<span title=[^>]* class="(\w+)"', article) == shades
        for prefix in ("", "reference_"):
            chosen, rejected = e[f"{prefix}chosen_logps"], e[f"{prefix}rejected_logps"]
            row = (f"<td>{value:z.4f}</td>" for value in (chosen, rejected, chosen - rejected))
            assert "".join(row) in article
        assert f"<td>{loss['chosen_reward']:z.4f}</td><td>{loss['rejected_reward']:z.4f}</td>" in article
        assert f"<td>{loss['chosen_weight']:+.6f}</td><td>{loss['rejected_weight']:+.6f}</td>" in article
        assert f"<td>{loss['sigmoid']:.4f}</td>" in article and f"<td>{loss['loss']:z.4f}</td>" in article
        gains.append(loss["margin"])
    largest_gain, largest_loss, *others = gains
    assert largest_gain == max(gains) and largest_loss == min(gains) < min(others)


def test_escaped(page, runs):
    """HTML in samples and in names is escaped wherever it is shown."""
    for file in (runs / "dpo/samples").iterdir():
        write(file, *(row | {"prompt": SCRIPT, "response": SCRIPT} for row in read(file)[:1]))
    shown = page((runs / "dpo").rename(runs / "<b onclick=1>"), runs / "rm")
    shown.require_text(SCRIPT)
    shown.require_text("<b onclick=1>")


def test_to_teach():
    """By hand: row 3 gained most, 0 lost most, 2 is the median; 1 lost, and the reference is against it too.
    It is against 4 as well, but training mended that."""
    picked = to_teach([-5.0, -1.0, 0.5, 9.0, 2.0], [-9.0, -2.0, -3.0, 1.0, -8.0])
    titles = {row: title.partition(":")[0] for row, title in picked.items()}
    assert titles == {3: "Largest gain", 0: "Largest loss", 2: "Typical", 1: "Looks mislabelled"}
    assert list(to_teach([1.0], [-1.0])) == [0]


def test_by_groups():
    """By hand: nine pairs in order of x are a group of two, (0, 1), and seven of one."""
    x, y = np.arange(9)[::-1], np.array([1, 0, 1, 0, 1, 0, 1, 0, 1])  # y of x = 0 is 1, of x = 1 it is 0
    assert by_groups(x, y) == [(0.5, 0.5), *((k, (k + 1) % 2) for k in range(2, 9))]


def test_in_words(trained, config, page, tmp_path, capsys):
    """The first paragraph says what was trained, on what, how long, with which result; its advice is what the
    run has printed."""
    last = [line for line in read(trained / "dpo/metrics.jsonl") if "eval/loss" in line][-1]
    said = page(trained / "dpo").text.partition("Curves")[0]
    for text in (
        "Its loss is dpo, -log sigma(z), with beta 0.1.",
        "It made 6 steps of 4 pairs, 0.86 epochs of pairs.jsonl.gz",  # 24 of the 28 pairs not held out
        f"step 0 → 6, loss 0.6931 → {last['eval/loss']:.4f}",
        f"KL 0.00 → {last['eval/kl']:.2f}",
    ):
        assert text in said, said
    run_dpo(config(optim__lr=0.3, optim__max_steps=8, run__eval_every=2))
    printed = re.findall("^warning: (.*)", capsys.readouterr().out, re.M)
    said = page(tmp_path / "out").text.partition("Curves")[0]
    assert printed and all(f"Warning: {warning}." in said for warning in printed)


def test_curves(trained, page):
    """Every held-out value is a dot that says it; two runs are told apart. The page loads nothing."""
    shown = page(trained / "dpo", trained / "rm")
    for line in (line for line in read(trained / "dpo/metrics.jsonl") if "eval/loss" in line):
        assert f"dpo, loss at step {line['step']}: {line['eval/loss']:.5g}" in shown.titles
    assert not re.search(r"https?:|@import|url\(|\b(src|href)=", shown.source)
    assert "default-src 'none'" in shown.source and len(shown.source.encode()) < 3e6
    assert re.findall("<button[^>]*>([^<]*)<", shown.source) == ["dpo", "rm"]
    alone = page(trained / "rm")
    assert "<button" not in alone.source and "Mean reward, nats" in alone.text


def test_samples(runs, page):
    """The first and the last response to a prompt, each with KL, reward, length and whether it ended; first
    those that moved most."""
    (runs / "dpo/samples/step-6.jsonl").rename(runs / "dpo/samples/step-10.jsonl")
    shown = page(runs / "dpo").text.split("samples before and after")[1]
    for row in (row for step in (0, 10) for row in read(runs / f"dpo/samples/step-{step}.jsonl")):
        about = f"KL {row['kl']:.2f} nats, reward {row['reward']:.3f}, {row['tokens']} tokens"
        assert about + ", not ended" * (not row["ended"]) + row["response"].strip() in shown
    kls = [float(kl) for kl in re.findall(r"KL (\S+) natsafter training", shown)]
    assert kls == sorted(kls, reverse=True) and len(kls) == 5


def test_reward_model(trained, world, page, tmp_path):
    """Margins and accuracy are those of `score`, and the pairs shown have the largest and smallest margins."""
    shown, out = page(trained / "rm"), tmp_path / "scores.jsonl"
    data = ["--data", str(world / "pairs.jsonl.gz"), "--out", str(out), "--device", "cpu"]
    score.main(["--reward-model", str(trained / "rm/final"), *data])
    rows = {row["index"]: row["chosen_reward"] - row["rejected_reward"] for row in read(out)}
    found = re.findall(r"(Most \w+): margin (-?\d+\.\d{4})record (\d+) of", shown.text)
    assert [title for title, _, _ in found] == ["Most wrong"] * 2 + ["Most sure"] * 2
    margins = [float(margin) for _, margin, _ in found]
    assert margins == pytest.approx([rows[int(index)] for _, _, index in found], abs=2e-4)
    assert margins == sorted(margins)
    last = read(trained / "rm/metrics.jsonl")[-1]
    assert f"right of 0 is right: accuracy {last['eval/accuracy']:.3f}" in shown.text
    shares = [float(said.split()[-1]) for said in shown.titles if said.startswith("share right")]
    assert len(shares) == 8 and max(shares) == 1 and min(shares) >= 0


TURNS = [{"role": "assistant", "content": "a cat"}, {"role": "user", "content": "no"}]
TURNS += [{"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("record", "settings", "says"),
    [
        ({"completion": " yes", "label": True}, {"loss__name": '"kto"'}, "<h4>desirable</h4>"),
        ({"chosen": " yes", "rejected": " no"}, {"loss__name": '"kto"'}, "<h4>undesirable</h4>"),
        ({"completion": " yes"}, {"loss__name": '"sft"'}, "loss = -log pi(y_w|x) / |y_w|"),
        ({"chosen": " yes", "rejected": " no"}, {"lora__rank": 2}, ", with adapters)"),
        ({"chosen": " yes", "rejected": " no"}, {"loss__name": '"simpo"'}, "z = beta log pi(y_w|x)/|y_w|"),
        ({"chosen": TURNS, "rejected": TURNS[:1]}, {"data__template": '"hh"'}, "</span>\n\nHuman: no\n\nA"),
    ],
)
def test_kinds(config, tmp_path, page, record, settings, says):
    """Runs of other losses and data have pairs too; a user's turn inside a response is not shaded."""
    rows = [{"prompt": f"{word}?", **record} for word in ("cat", "dog", "it")]
    if "label" in record:
        rows[0]["label"] = False
    if "data__template" in settings:
        rows = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    files = [str(write(tmp_path / "a.jsonl", *rows))]
    settings |= {"data__train": files, "data__eval": files, "data__eval_pairs": 0, "optim__max_steps": 1}
    run_dpo(config(**settings, optim__batch_size=2))
    with (tmp_path / "out/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 2, "eval/loss": 1.0, "eval/z0": 0.625}\n')
    shown = page(tmp_path / "out")
    assert says in shown.source and "Largest gain" in shown.text
    assert ("0.625" in shown.text) == (settings.get("loss__name") == '"kto"')  # in the equation of a pair


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("final", "No pairs are shown: RUN/final/tokenizer.json: no such file"),
        ((r"eval_pairs = \d+", "eval_pairs = 0"), "No pairs are shown: the run holds out none"),
        ((r'train = \[".*"\]', 'train = ["gone.jsonl"]'), "No pairs are shown: gone.jsonl: No such file"),
    ],
)
def test_incomplete(runs, page, what, says):
    """A run that lacks something is shown as far as it goes, and the page says what is missing."""
    file = runs / "dpo" / "config.toml"
    if what == "final":
        shutil.rmtree(runs / "dpo" / "final")
    else:
        file.write_text(re.sub(*what, file.read_text()))
    with (runs / "dpo/metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 7, "eval/loss": null, "eval/kl": "?"}\n')  # as a program may write for NaN
    shown = page(runs / "dpo")
    assert says.replace("RUN", str(runs / "dpo")) in shown.text and "All settings" in shown.text
    assert "step 0 → 7, loss 0.6931 → nan" in shown.text
    assert ("It is not finished: there is no final/." in shown.text) == (what == "final")


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
