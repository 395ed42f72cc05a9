"""`python -m minidpo explain`: its numbers are those of `score` and of training; they can be checked."""

import json
import math
import re
from dataclasses import dataclass

import pytest
import torch

import train_dpo
from minidpo.errors import UserError
from minidpo.log import console_line
from minidpo.losses import DPO, IPO, LOSSES, SFT, PairLogps, SimPO
from minidpo.model import save_model
from minidpo.settings import positive, setting
from minidpo.tools import explain as command
from minidpo.tools.explain import every_loss, under
from minidpo.tools.explain import main as explain
from minidpo.tools.explain_text import RESET, render
from minidpo.tools.score import main as score
from tiny import tiny_model, write_tokenizer

TEXTS = ["--prompt", "\\n\\nHuman: a cat\\n\\nAssistant:", "--chosen", " yes", "--rejected", " no\\nno"]
NUMBERS = ("policy_logp", "reference_logp", "difference", "policy_sum", "reference_sum", "difference_sum")


@pytest.fixture
def text(world, capsys):
    """The printed table of `explain` for the arguments given, on CPU."""

    def printed(*arguments: str) -> str:
        capsys.readouterr()  # What came before is not of this command.
        explain(["--model", str(world / "model"), "--device", "cpu", *arguments])
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


def test_sums_of_score(world, explained, text, pair, tmp_path):
    """The sums are those of `score`: of a pair alone to the last bit, among other pairs to the last digit."""
    lines = [
        json.dumps({"prompt": "a", "chosen": f" yes{' maybe' * k}", "rejected": " no"}) for k in range(4)
    ]
    one = tmp_path / "one.jsonl"
    one.write_text(lines[3])
    for data, index, exact in ((one, 0, True), (world / "pairs.jsonl.gz", 7, False)):
        models = ["--reference", str(world / "other"), "--data", str(data)]
        score(["--model", str(world / "model"), *models, "--out", str(tmp_path / "s"), "--device", "cpu"])
        row = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()][index]
        mine = explained(*models, "--index", str(index))
        for name, value in row.items():
            assert mine[name] == (value if exact else pytest.approx(value, abs=5e-5)), name
    table = text(*pair)
    for name in ("chosen", "rejected"):
        assert f" {row[f'{name}_logps']:.4f}" in table
        assert f" {row[f'reference_{name}_logps']:.4f}" in table


@pytest.mark.parametrize("name", LOSSES)
def test_loss_of_the_first_step(config, explained, text, tmp_path, name, world):
    """The loss and the rewards are those of the first logged step to the last digit."""
    data = tmp_path / "one.jsonl"
    data.write_text('{"prompt": "a cat", "chosen": " yes and no", "rejected": " runs"}\n')
    arguments = [*config(optim__batch_size=1, optim__max_steps=1, data__eval_pairs=0), f"--data.train={data}"]
    train_dpo.main([*arguments, f"--loss.name={name}", f"--reference.path={world / 'other'}"])
    step = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    models = ["--reference", str(world / "other"), "--data", str(data), "--index", "0", "--loss", name]
    mine = explained(*models)["loss"]
    assert mine["loss"] == step["loss"]
    logged = re.findall(r"(?:loss|margin|chosen|rejected) +(\S+)", console_line(step, 1, 0))
    assert f"{mine['loss']:.4f}" == logged[0]
    table = text(*models)
    assert all(f" {number}\n" in table or f" {number} " in table for number in logged)
    assert len(logged) == (4 if LOSSES[name].responses == 2 else 1)
    if LOSSES[name].responses == 2:
        for key, of_step in (
            ("chosen_reward", "chosen"),
            ("rejected_reward", "rejected"),
            ("margin", "margins"),
        ):
            assert mine[key] == step[f"rewards/{of_step}"]


ON_PAPER = (DPO, IPO, SimPO, SFT)


def on_paper(loss, pair: PairLogps) -> tuple[float, list[float]]:
    """A pair's argument and gradient weights in closed form."""
    policy = torch.stack(pair[:2]).squeeze(1)  # (2,): chosen, rejected
    lengths = torch.stack(pair[4:6]).squeeze(1)
    values = policy - torch.stack(pair[2:4]).squeeze(1) if loss.needs_reference else policy
    over = 1.0
    if isinstance(loss, SimPO | SFT) or loss.length_normalize:
        values, over = values / lengths, lengths
    if isinstance(loss, SFT):
        return values[0].item(), [1 / lengths[0].item(), 0.0]
    h = (values[0] - values[1]).item()
    z = loss.beta * h - (loss.gamma if isinstance(loss, SimPO) else 0)
    if isinstance(loss, IPO):
        z, pull = h, 2 * (1 / (2 * loss.beta) - h)
    else:
        e = loss.label_smoothing
        pull = loss.beta * ((1 - e) / (1 + math.exp(z)) - e / (1 + math.exp(-z)))
    return z, (pull * torch.tensor([1.0, -1.0]).double() / over).tolist()


@pytest.mark.parametrize(
    "loss",
    [*(loss for loss in every_loss() if type(loss) in ON_PAPER), SimPO(gamma=0.3, label_smoothing=0.2)],
    ids=repr,
)
def test_argument_and_weights(loss):
    """A loss's argument and gradient weights are those on paper, and the sigmoid leads to its value."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(6):
        logps = -20 * torch.rand(4, 1, generator=draw, dtype=torch.float64) - 1
        pair = PairLogps(*logps, *torch.randint(1, 9, (2, 1), generator=draw))
        found = under(loss, pair)
        argument, weights = on_paper(loss, pair)
        assert found["argument"] == pytest.approx(argument, rel=1e-12)
        assert [found["chosen_weight"], found["rejected_weight"]] == pytest.approx(weights, rel=1e-9)
        if "sigmoid" in found:
            e, s = loss.label_smoothing, found["sigmoid"]
            assert found["loss"] == pytest.approx(-(1 - e) * math.log(s) - e * math.log(1 - s), rel=1e-9)


def test_every_loss():
    """The table has each loss at its defaults, and again with each setting that changes its form."""
    normalised, smoothed = {"length_normalize": True}, {"label_smoothing": 0.1}
    dpo = [DPO(), DPO(**smoothed), DPO(**normalised)]
    expected = [*dpo, IPO(), IPO(**normalised), SimPO(), SimPO(**smoothed), SFT()]
    table = list(every_loss())
    assert [loss for loss in table if type(loss) in ON_PAPER] == expected
    assert [type(loss) for loss in table if loss == type(loss)()] == list(LOSSES.values())


def test_a_loss_of_your_own(explained, text, pair, monkeypatch):
    """A new class is explained by what it says of itself, and by its value and weights."""

    @dataclass(frozen=True)
    class Squared(DPO):
        """The margin, squared.

        loss = z^2 / scale,    z as in DPO
        """

        name, saturates, equation, gradient = "squared", False, "z^2 / scale", "-2 beta z / scale"
        scale: float = setting(1.0, "divides the square", positive)

        def __call__(self, pairs):
            return self.z(pairs).square() / self.scale

    monkeypatch.setitem(LOSSES, "squared", Squared)
    arguments = [*pair, "--loss", "squared", "--beta", "0.3", "--scale", "2"]
    everything = explained(*arguments)
    mine = everything["loss"]
    assert everything["losses"][-1] == mine and "sigmoid" not in mine
    assert mine["loss"] == pytest.approx(mine["margin"] ** 2 / 2)
    assert mine["chosen_weight"] == pytest.approx(-0.3 * mine["margin"], rel=1e-6)
    table = text(*arguments)
    assert (
        "squared: The margin, squared.\n    loss = z^2 / scale,    z as in DPO\n  beta 0.3: strength" in table
    )
    assert f"loss = z^2 / scale{mine['loss']:>44.4f}" in table
    assert f"gradient weight = -2 beta z / scale{mine['chosen_weight']:>+27.6f}" in table


def test_settings_of_a_run(config, explained, text, pair, tmp_path):
    """The settings are those of the run whose final/ the model is, unless others are given."""
    train_dpo.main([*config(optim__max_steps=1), "--loss.beta=0.37", "--loss.label_smoothing=0.2"])
    of_run = ["--model", str(tmp_path / "out" / "final"), *pair]
    loss = explained(*of_run)["loss"]
    assert (loss["name"], loss["beta"], loss["label_smoothing"]) == ("dpo", 0.37, 0.2)
    assert f"as {tmp_path / 'out' / 'config.toml'} says" in text(*of_run)
    assert explained(*of_run, "--beta", "0.5")["loss"]["beta"] == 0.5
    assert explained(*of_run, "--loss", "ipo")["loss"]["beta"] == 0.1
    assert explained(*pair)["loss"]["beta"] == 0.1
    assert explained(*pair, "--loss", "simpo")["loss"]["beta"] == 2.0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_with_a_calculator(text, pair, smoothing):
    """Read back as a student would: differences, running sums, log-ratios, reward, sigmoid, loss, weight."""
    table = text(*pair, "--beta", "0.3", "--label-smoothing", str(smoothing), "--every-token")
    rows = re.findall(r"^ *\d+ (chosen|rejected|eos) .* yes +(.*)$", table, re.M)
    totals, sums = [], [0.0] * 3
    for role, numbers in rows:
        policy, reference, difference, *running = map(float, numbers.split())
        assert policy - reference == pytest.approx(difference, abs=2e-4)
        sums = [a + b for a, b in zip(sums, (policy, reference, difference), strict=True)]
        assert running == pytest.approx(sums, abs=1e-3 * len(rows))
        if role == "eos":
            totals.append(running)
            sums = [0.0] * 3

    def value(label: str, column: int = 0) -> float:
        return float(re.search(rf"^  {re.escape(label)}.*? +([-+\d. ]+)$", table, re.M)[1].split()[column])

    z = 0.3 * (totals[0][2] - totals[1][2])
    assert value("implicit reward r(x, y); their margin", 2) == pytest.approx(z, abs=2e-4)
    assert value("z or h, what the loss is a function of") == pytest.approx(z, abs=2e-4)
    sigmoid, e = 1 / (1 + math.exp(-z)), smoothing
    assert value("sigma(z)") == pytest.approx(sigmoid, abs=1e-4)
    loss = -(1 - e) * math.log(sigmoid) - e * math.log(1 - sigmoid)
    assert value("loss = -log sigma(z)") == pytest.approx(loss, abs=2e-4)
    weight = 0.3 * ((1 - e) * (1 - sigmoid) - e * sigmoid)
    assert value("gradient weight = beta * sigma(-z)") == pytest.approx(weight, abs=1e-4)
    assert ("smoothed, e = label_smoothing: (1-e) loss(z) + e loss(-z)" in table) == bool(smoothing)


def test_without_a_reference(explained, text, pair):
    """Every log-ratio is 0, and the output says so."""
    mine = explained(*pair[:4])
    assert mine["reference"] is None
    assert {token["difference"] for token in mine["tokens"] if token["scored"]} == {0.0}
    assert mine["loss"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert "the policy itself (no --reference): every log-ratio is 0" in text(*pair[:4])
    assert "the policy itself" not in text(*pair)


def test_every_token_is_there(explained):
    """Every token is in the table, and only those of responses are scored."""
    mine = explained(*TEXTS)
    assert [t["scored"] for t in mine["tokens"]] == [t["response"] is not None for t in mine["tokens"]]
    assert all(set(NUMBERS) <= set(token) for token in mine["tokens"] if token["scored"])
    assert not any(set(NUMBERS) & set(token) for token in mine["tokens"] if not token["scored"])
    joined = "".join(token["text"] for token in mine["tokens"])
    assert joined == "<s>\n\nHuman: a cat\n\nAssistant: yes</s> no\nno</s>"
    assert (mine["prompt"], mine["rejected"]) == ("\n\nHuman: a cat\n\nAssistant:", " no\nno")


def test_long_texts(explained, text):
    """Long texts are abbreviated unless all tokens are asked for, and lines fit 100 columns."""
    prompt, response = "a cat " * 15, " 日本 and" * 8 + "\\n" + " well" * 3
    arguments = ["--prompt", prompt, "--chosen", response, "--rejected", " " + "no" * 45]
    mine, short = explained(*arguments), text(*arguments)
    prompt_length = sum(not token["scored"] for token in mine["tokens"])
    assert f"{prompt_length - 8} tokens left out" in short
    assert len(re.findall(r"^ *\d+ prompt ", short, re.M)) == 8
    whole = text(*arguments, "--every-token")
    assert len(re.findall(r" yes +-", whole)) == len(mine["tokens"]) - prompt_length
    assert "'\\n'" in whole and "left out" not in whole
    for role, length in (("chosen", mine["chosen_length"]), ("rejected", mine["rejected_length"])):
        assert length > 42 and f"{role:<8} {length - 40} tokens left out, counted in the sums" in short
    assert set(short.splitlines()) - set(whole.splitlines()) == set(re.findall(r".* left out.*", short))
    for loss in LOSSES:
        for line in text(*arguments, "--loss", loss).splitlines():
            assert len(line) <= 100 and line == line.rstrip()
    assert "left out" not in text("--prompt", "a cat", *TEXTS[2:])


@pytest.mark.parametrize(("terminal", "no_color", "coloured"), [(1, "", 1), (1, "1", 0), (0, "", 0)])
def test_colour_on_a_terminal(text, pair, monkeypatch, terminal, no_color, coloured):
    """There is colour on a terminal alone, and none with NO_COLOR."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: bool(terminal), raising=False)
    table = text(*pair)
    assert ("\033[" in table) == bool(coloured)
    for line in table.splitlines():  # what is switched on is switched off
        assert "\033[" not in line.rpartition(RESET)[2]


def test_colour_of_a_token(explained, pair):
    """Colour says how far the policy moved a token."""
    mine = explained(*pair)
    moved = [token for token in mine["tokens"] if token["scored"] and abs(token["difference"]) >= 0.01]
    lines = [line for line in render(mine, True, every_token=True).splitlines() if RESET in line][1:]
    assert len(lines) == len(moved) > 10
    for token, line in zip(moved, lines, strict=True):
        assert ("\033[32m" in line) == (token["difference"] > 0)
        assert ("\033[1m" in line) == (abs(token["difference"]) >= 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a pair either as --data"),
        (["--data", "DATA", "--index", "1", "--prompt", "a"], "give a pair either as --data"),
        (["--data", "DATA"], "--index is missing"),
        (["--data", "DATA", "--index", "-1"], "--index -1"),
        (["--data", "DATA", "--index", "40"], "has 40 records; the last is 39"),
        (["--data", "nowhere.jsonl", "--index", "0"], "nowhere.jsonl: No such file"),
        (["--prompt", "a", "--chosen", "b"], "all three"),
        ([*TEXTS, "--index", "0"], "no --index"),
        (["--prompt", "a", "--chosen", "b", "--rejected", " "], "nothing but blanks"),
        ([*TEXTS, "--max-length", "5"], "max_length = 5"),
        ([*TEXTS, "--max-length", "999"], "the model takes 256"),
        ([*TEXTS, "--reference", "nowhere"], "nowhere"),
        ([*TEXTS, "--reference", "SMALL"], "they do not belong together"),
        ([*TEXTS, "--reference", "FOREIGN"], "other ids than the model's"),
        ([*TEXTS, "--beta", "0"], "dpo: beta is 0.0; it must be > 0"),
        ([*TEXTS, "--loss", "kto"], "--loss kto: it must be one of " + ", ".join(LOSSES)),
        ([*TEXTS, "--gamma", "2"], "the loss dpo has no such setting; it has --beta, --label-smoothing"),
        ([*TEXTS, "--loss", "sft", "--beta", "2"], "the loss sft has no such setting; it has no settings"),
    ],
)
def test_refusals(explained, world, tmp_path, arguments, says):
    """What cannot be explained is refused in one line."""
    places = {"DATA": str(world / "pairs.jsonl.gz"), "SMALL": str(tmp_path / "small")}
    write_tokenizer(tmp_path / "small", ["a"])
    save_model(tiny_model(vocab_size=61), tmp_path / "small")
    places["FOREIGN"] = str(tmp_path / "foreign")
    write_tokenizer(tmp_path / "foreign", ["Human: a cat"], vocabulary=290)
    save_model(tiny_model(vocab_size=300), tmp_path / "foreign")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        explained(*[places.get(argument, argument) for argument in arguments])
    assert "\n" not in str(error.value)


def test_bad_records(explained, tmp_path):
    """A record that teaches nothing is refused with its line, and the others of the file do not matter."""
    data = tmp_path / "pairs.jsonl"
    records = ['{"chosen": 1}\n', *({"prompt": "a", "chosen": text, "rejected": "b"} for text in " b")]
    data.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    with pytest.raises(UserError, match=r"pairs.jsonl:3: nothing but blanks"):
        explained("--data", str(data), "--index", "1")
    with pytest.raises(UserError, match=r"pairs.jsonl:1: no key 'rejected'"):
        explained("--data", str(data), "--index", "0")
    assert explained("--data", str(data), "--index", "2")["chosen"] == "b"
