"""`python -m minidpo explain`: its numbers are those of `score` and of training; they can be checked."""

import json
import math
import re
from dataclasses import dataclass

import pytest

from minidpo.errors import UserError
from minidpo.losses import DPO, LOSSES
from minidpo.settings import positive, setting
from minidpo.tools import explain as command
from minidpo.tools.report_page import Markup, tag
from minidpo.tools.score import main as score
from page import SCRIPT, Page
from record_files import GOOD, read, write
from runs import run_dpo

OF_ONE_PAIR = [name for name, loss in LOSSES.items() if not loss.needs_z0]
TEXTS = ["--prompt", "\\n\\nHuman: a cat\\n\\nAssistant:", "--chosen", " yes", "--rejected", " no\\nno"]


@pytest.fixture
def text(world, capsys):
    """The table that `explain` prints."""

    def printed(*arguments: str) -> str:
        capsys.readouterr()  # What came before is not of this command.
        command.main(["--model", str(world / "model"), "--device", "cpu", *arguments])
        return capsys.readouterr().out

    return printed


@pytest.fixture
def explained(text):
    """The JSON object of `explain`."""
    return lambda *arguments: json.loads(text("--json", *arguments))


@pytest.fixture
def pair(world):
    """Arguments for record 7 of the world, with a reference."""
    return ["--data", str(world / "pairs.jsonl.gz"), "--index", "7", "--reference", str(world / "other")]


def test_sums_of_score(world, explained, pair, tmp_path):
    """The sums are those of `score`: bit for bit if the file has one pair, up to rounding if it has more."""
    one = ["--data", str(write(tmp_path / "one.jsonl", GOOD)), "--reference", str(world / "other")]
    for data, index, tolerance in ((one, 0, 0), ([*pair[:2], *pair[4:]], 7, 5e-5)):
        out = tmp_path / "scores.jsonl"
        score(["--model", str(world / "model"), *data, "--out", str(out), "--device", "cpu"])
        row, mine = read(out)[index], explained(*data, "--index", str(index))
        assert {name: mine[name] for name in row} == pytest.approx(row, rel=0, abs=tolerance)


@pytest.mark.parametrize("name", OF_ONE_PAIR)
def test_first_step(config, explained, tmp_path, name, world):
    """The loss and the rewards are those of the first logged step to the last digit."""
    data = write(tmp_path / "one.jsonl", {"prompt": "a cat", "chosen": " yes and no", "rejected": " runs"})
    arguments = config(optim__batch_size=1, optim__max_steps=1, data__eval_pairs=0)
    reference = str(world / "other")
    settings = (f"--data.train={data}", f"--loss.name={name}", f"--reference.path={reference}")
    step, *_ = run_dpo(arguments, *settings)
    of_pair = ["--reference", reference, "--data", str(data), "--index", "0", "--loss", name]
    loss = explained(*of_pair)["loss"]
    assert loss["loss"] == step["loss"]
    if LOSSES[name].responses == 2:
        rewards = [step[f"rewards/{key}"] for key in ("chosen", "rejected", "margins")]
        assert [loss["chosen_reward"], loss["rejected_reward"], loss["margin"]] == rewards


def test_every_loss(explained, text, pair):
    """The table has the pair under its own loss, and under every other one at its defaults. APO-zero and SFT
    are functions of no difference z, so none is shown."""
    losses = explained(*pair, "--beta", "0.3")["losses"]
    assert [loss["name"] for loss in losses] == ["dpo", *OF_ONE_PAIR]
    assert [loss.get("beta") for loss in losses[:2]] == [0.3, 0.1]
    of_z = {loss["name"] for loss in losses if "argument" in loss}
    assert of_z >= {"dpo", "ipo", "simpo", "orpo", "hinge"} and not of_z & {"apo_zero", "sft"}
    assert "z or h of" not in text(*pair, "--loss", "apo_zero")


def test_settings_of_a_run(config, explained, text, pair, tmp_path):
    """The settings are those of the run that made the model, unless others are given."""
    run_dpo(config(optim__max_steps=1), "--loss.beta=0.37", "--loss.label_smoothing=0.2")
    out = tmp_path / "out"
    of_run = ["--model", str(out / "final"), *pair]
    loss, table = explained(*of_run)["loss"], text(*of_run)
    assert (loss["name"], loss["beta"], loss["label_smoothing"]) == ("dpo", 0.37, 0.2)
    assert f"as {out / 'config.toml'} says" in table and "training cuts" not in table
    long = ["--prompt", " cat" * 41, "--chosen", " yes", "--rejected", " no"]
    limits = "data.max_length = 64, data.max_prompt_length = 40"
    assert f"(training cuts this pair: {limits})" in text("--model", str(out / "final"), *long)
    for others, beta in ((["--beta", "0.5"], 0.5), (["--loss", "ipo"], 0.1)):
        assert explained(*of_run, *others)["loss"]["beta"] == beta


def test_without_a_reference(explained, text, pair):
    """Every log-ratio is 0, and the output says so."""
    mine, itself = explained(*pair[:4]), "the policy itself (no --reference): every log-ratio is 0"
    assert {token["difference"] for token in mine["tokens"] if token["scored"]} == {0.0}
    assert mine["loss"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert itself in text(*pair[:4]) and itself not in text(*pair)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_with_a_calculator(text, pair, e):
    """Read back as a student would: differences, running sums, reward, sigmoid, loss, weight."""
    table = text(*pair, "--beta", "0.3", "--label-smoothing", str(e), "--every-token")
    log_ratios, sums = [], [0.0] * 3  # sums of the policy's, the reference's and their difference
    row = r"^ *\d+ (chosen|rejected|eos) .*?((?: +[-+]?\d+\.\d{4}){6})$"
    for role, numbers in re.findall(row, table, re.M):
        policy, reference, difference, *so_far = map(float, numbers.split())
        assert policy - reference == pytest.approx(difference, abs=2e-4)
        sums = [a + b for a, b in zip(sums, (policy, reference, difference), strict=True)]
        assert so_far == pytest.approx(sums, abs=0.02)  # roundings add up
        if role == "eos":
            log_ratios.append(so_far[2])
            sums = [0.0] * 3
    z = 0.3 * (log_ratios[0] - log_ratios[1])
    sigmoid = 1 / (1 + math.exp(-z))
    for label, number in (
        ("log-ratio = log pi - log pi_ref", log_ratios[0] - log_ratios[1]),
        ("implicit reward r(x, y); their margin", z),
        ("z or h of the equation", z),
        ("sigma(z)", sigmoid),
        ("loss  ", -(1 - e) * math.log(sigmoid) - e * math.log(1 - sigmoid)),
        ("gradient weight, -d loss", -0.3 * ((1 - e) * (1 - sigmoid) - e * sigmoid)),  # rejected's
    ):
        printed = re.search(rf"^{re.escape(label)}.* ([-+\d.]+)$", table, re.M)[1]
        assert float(printed) == pytest.approx(number, abs=2e-4)
    assert ("gradient weight = beta * sigma(-z), smoothed: (1-e) loss(z) + e loss(-z)" in table) == bool(e)


def test_own_loss(explained, text, pair, monkeypatch):
    """A new class is explained by what it says of itself, and by its value and weights."""

    @dataclass(frozen=True)
    class Squared(DPO):
        """The margin, squared.

        loss = z^2 / scale,    z as in DPO
        """

        name, z_is_logit, equation, gradient = "squared", False, "z^2 / scale", "-2 beta z / scale"
        scale: float = setting(1.0, "divides the square", positive)

        def preference(self, pairs):
            return self.z(pairs).square() / self.scale

    monkeypatch.setitem(LOSSES, "squared", Squared)
    arguments = [*pair, "--loss", "squared", "--beta", "0.3", "--scale", "2"]
    loss, table = explained(*arguments)["loss"], text(*arguments)
    assert loss["loss"] == pytest.approx(loss["margin"] ** 2 / 2) and "sigmoid" not in loss
    assert loss["chosen_weight"] == pytest.approx(-0.3 * loss["margin"], rel=1e-6)
    assert "The margin, squared.\nbeta 0.3, scale 2\nloss = z^2 / scale,    z as in DPO\nloss = " in table
    assert "gradient weight = -2 beta z / scale\n" in table


def test_long_texts(explained, text):
    """Long texts are abbreviated unless all tokens are asked for, and lines fit 100 columns."""
    arguments = ["--prompt", "a cat " * 15, "--chosen", " and" * 48, "--rejected", " " + "no" * 45]
    mine, short, whole = explained(*arguments), text(*arguments), text(*arguments, "--every-token")
    lengths = {"prompt": sum(not token["scored"] for token in mine["tokens"])}
    lengths |= {role: mine[f"{role}_length"] for role in ("chosen", "rejected")}
    for role, length in lengths.items():
        assert f" ... {role:<8} {length - (8 if role == 'prompt' else 40)} left out" in short
    assert "left out" not in whole
    assert set(short.splitlines()) - set(whole.splitlines()) == set(re.findall(r".* left out.*", short))
    for loss in OF_ONE_PAIR:
        assert not [line for line in text(*arguments, "--loss", loss).splitlines() if len(line) > 100]


def test_turns(explained, text, tmp_path):
    """What others said in a response has no log-prob, and the sums are those of the other tokens."""
    said = (("assistant", "a cat"), ("user", "no"), ("assistant", "it runs"))
    chosen = [{"role": role, "content": content} for role, content in said]
    record = {"prompt": [{"role": "user", "content": "a?"}], "chosen": chosen, "rejected": chosen[2:]}
    arguments = ["--data", str(write(tmp_path / "a.jsonl", record)), "--index", "0", "--template", "hh"]
    mine, table = explained(*arguments), text(*arguments, "--every-token")
    every = [token for token in mine["tokens"] if token["response"] == "chosen"]
    others = [token for token in every if token["role"] == "other"]
    assert "".join(token["text"] for token in others) == "\n\nHuman: no\n\nAssistant:"
    assert all(token["scored"] == ("policy_logp" in token) for token in mine["tokens"])
    scored = [token["policy_logp"] for token in every if token["scored"]]
    assert mine["chosen_length"] == len(scored) == len(every) - len(others)
    assert mine["chosen_logps"] == every[-1]["policy_sum"] == pytest.approx(sum(scored), rel=1e-5)
    assert len(re.findall(r"^ *\d+ other .*'$", table, re.M)) == len(others)
    assert f" {len(every)} of chosen, " in table and f" ({len(others)} by others, not scored);" in table


def test_one_response(explained, text, tmp_path):
    """A record of one response has its own half of the table, under the losses that read one."""
    single, pair = {"prompt": "a", "completion": " yes"}, {"prompt": "a", "chosen": " yes", "rejected": " no"}
    files = (write(tmp_path / "one.jsonl", single), write(tmp_path / "two.jsonl", pair))
    one, two = (("--data", str(file), "--index", "0", "--loss") for file in files)
    both, mine, table = explained(*two, "sft"), explained(*one, "sft"), text(*one, "sft")
    assert mine["chosen_logps"] == both["chosen_logps"] and mine["loss"] == both["loss"]
    assert "rejected_logps" not in mine and "chosen - rejected" not in table
    assert {loss["name"] for loss in mine["losses"]} == {"sft"}
    with pytest.raises(UserError, match="dpo compares 2 responses, and the record has 1; give --loss sft"):
        text(*one, "dpo")


@pytest.fixture
def typed(text, world, tmp_path):
    """The page of `explain --html` for a typed pair."""

    def written(chosen: str, *more: str, prompt: str = "a cat") -> Page:
        out, both = tmp_path / "pair.html", ["--prompt", prompt, "--chosen", chosen, "--rejected", " no"]
        text(*both, "--reference", str(world / "other"), "--html", str(out), *more)
        return Page(out)

    return written


@pytest.mark.parametrize("more", [[], ["--length-normalize"]])
def test_equation(typed, more):
    """The equation is shown with the numbers of the pair in it, and they give the loss."""
    shown = typed(" yes", *more).text
    lines = re.findall(r"loss = (.*)", shown)
    assert ("gradient weight = beta * sigma(-z) / |y|nats" in shown) == bool(more)  # "nats" begins a table
    log_ratios = re.findall(r"0\.1 \[ \(?(-?[\d.]+)\)? - \(?(-?[\d.]+)\)? \]", lines[1])[0]
    z = 0.1 * (float(log_ratios[0]) - float(log_ratios[1]))
    assert lines[0].startswith("-log sigma(z),    z = beta [ log pi(y_w|x)/pi_ref(y_w|x)")
    assert float(re.search(r"sigma\((-?[\d.]+)\)", lines[1])[1]) == pytest.approx(z, abs=1e-3)
    assert float(lines[2].split()[0]) == pytest.approx(math.log1p(math.exp(-z)), abs=1e-3)


def test_escaped(typed):
    """A response that contains <script>, or a prompt, is shown as text."""
    typed(f" {SCRIPT}").require_text(SCRIPT)
    typed(" yes", prompt=f"Say {SCRIPT}").require_text(SCRIPT)
    assert tag("p", "<", Markup("<b>"), title='"<') == '<p title="&quot;&lt;">&lt;<b></p>'


# No letter of the first two is a token of the tests' tokenizer.
@pytest.mark.parametrize("response", [" 👩‍👧 日本", " שלום עולם", " a\nb"])
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
    assert len(shown.titles) < 50
    assert " 62 left out " in shown.text  # 101 words and EOS, of which 40 are shown
