"""`python -m minidpo explain`: its numbers are those of `score` and of training; they can be checked."""

import json
import math
import re
from dataclasses import dataclass

import pytest
import torch

from minidpo.errors import UserError
from minidpo.log import console_line
from minidpo.losses import DPO, IPO, LOSSES, SFT, PairLogps, SimPO
from minidpo.model import save_model
from minidpo.settings import positive, setting
from minidpo.tools import explain as command
from minidpo.tools.explain import every_loss, under
from minidpo.tools.explain_text import RESET, render
from minidpo.tools.score import main as score
from record_files import GOOD, read, write
from runs import run_dpo
from tiny import tiny_model, write_tokenizer

OF_ONE_PAIR = [name for name, loss in LOSSES.items() if not loss.needs_z0]
TEXTS = ["--prompt", "\\n\\nHuman: a cat\\n\\nAssistant:", "--chosen", " yes", "--rejected", " no\\nno"]
GREEN, BOLD = "\033[32m", "\033[1m"


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


def test_sums_of_score(world, explained, text, pair, tmp_path):
    """The sums are those of `score`: of a pair alone to the last bit, among others to the last digit."""
    one = ["--data", str(write(tmp_path / "one.jsonl", GOOD)), "--reference", str(world / "other")]
    for data, index, tolerance in ((one, 0, 0), ([*pair[:2], *pair[4:]], 7, 5e-5)):
        out = tmp_path / "scores.jsonl"
        score(["--model", str(world / "model"), *data, "--out", str(out), "--device", "cpu"])
        row, mine = read(out)[index], explained(*data, "--index", str(index))
        assert {name: mine[name] for name in row} == pytest.approx(row, rel=0, abs=tolerance)
    table = text(*pair)
    for name in ("chosen_logps", "rejected_logps", "reference_chosen_logps", "reference_rejected_logps"):
        assert f" {row[name]:.4f}" in table


@pytest.mark.parametrize("name", OF_ONE_PAIR)
def test_first_step(config, explained, text, tmp_path, name, world):
    """The loss and the rewards are those of the first logged step to the last digit."""
    data = write(tmp_path / "one.jsonl", {"prompt": "a cat", "chosen": " yes and no", "rejected": " runs"})
    arguments = config(optim__batch_size=1, optim__max_steps=1, data__eval_pairs=0)
    reference = str(world / "other")
    settings = (f"--data.train={data}", f"--loss.name={name}", f"--reference.path={reference}")
    step, *_ = run_dpo(arguments, *settings)
    of_pair = ["--reference", reference, "--data", str(data), "--index", "0", "--loss", name]
    loss, table = explained(*of_pair)["loss"], text(*of_pair)
    assert loss["loss"] == step["loss"]
    if LOSSES[name].responses == 2:
        rewards = [step[f"rewards/{key}"] for key in ("chosen", "rejected", "margins")]
        assert [loss["chosen_reward"], loss["rejected_reward"], loss["margin"]] == rewards
    for number in re.findall(r"(?:loss|margin|chosen|rejected) +(\S+)", console_line(step, 1, 0)):
        assert re.search(rf" {number}[ \n]", table)


def test_by_hand():
    """Log-probs -10 and -12, of the reference -11 and -11.5, in 4 and 5 tokens: log-ratios 1 and -0.5."""
    numbers = (torch.tensor([number]) for number in (-10.0, -12.0, -11.0, -11.5, 4, 5))
    pair = PairLogps(*numbers)
    # z = 0.5 (1 / 4 + 0.5 / 5), sigma(z) = 0.543639; weights 0.5 (1 - sigma) / 4 and / 5
    dpo, sft = under(DPO(beta=0.5, length_normalize=True), pair), under(SFT(), pair)
    assert (dpo["argument"], dpo["sigmoid"]) == pytest.approx((0.175, 0.543639), abs=1e-6)
    assert (dpo["chosen_weight"], dpo["rejected_weight"]) == pytest.approx((0.057045, -0.045636), abs=1e-6)
    assert (sft["argument"], sft["chosen_weight"], sft["rejected_weight"]) == (-2.5, 0.25, 0.0)


def test_every_loss():
    """The table has each loss at its defaults, and again with each setting that changes its form."""
    normalised, smoothed = {"length_normalize": True}, {"label_smoothing": 0.1}
    dpo = [DPO(), DPO(**smoothed), DPO(**normalised)]
    expected = [*dpo, IPO(), IPO(**normalised), SimPO(), SimPO(**smoothed), SFT()]
    assert [loss for loss in every_loss() if type(loss) in (DPO, IPO, SimPO, SFT)] == expected
    assert {loss.name for loss in every_loss()} == {*OF_ONE_PAIR}


def test_settings_of_a_run(config, explained, text, pair, tmp_path):
    """The settings are those of the run that made the model, unless others are given."""
    run_dpo(config(optim__max_steps=1), "--loss.beta=0.37", "--loss.label_smoothing=0.2")
    out = tmp_path / "out"
    for model in ("checkpoints/step-1", "final"):
        of_run = ["--model", str(out / model), *pair]
        loss = explained(*of_run)["loss"]
        assert (loss["name"], loss["beta"], loss["label_smoothing"]) == ("dpo", 0.37, 0.2)
        assert f"as {out / 'config.toml'} says" in text(*of_run)
    assert explained(*of_run, "--beta", "0.5")["loss"]["beta"] == 0.5
    assert explained(*of_run, "--loss", "ipo")["loss"]["beta"] == 0.1
    assert explained(*pair)["loss"]["beta"] == 0.1


def test_without_a_reference(explained, text, pair):
    """Every log-ratio is 0, and the output says so."""
    mine, itself = explained(*pair[:4]), "the policy itself (no --reference): every log-ratio is 0"
    assert mine["reference"] is None
    assert {token["difference"] for token in mine["tokens"] if token["scored"]} == {0.0}
    assert mine["loss"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert itself in text(*pair[:4]) and itself not in text(*pair)


def test_every_token(explained):
    """Every token is in the table, and those of responses alone are scored."""
    tokens = explained(*TEXTS)["tokens"]
    assert "".join(t["text"] for t in tokens) == "<s>\n\nHuman: a cat\n\nAssistant: yes</s> no\nno</s>"
    for token in tokens:
        assert token["scored"] == (token["response"] is not None) == ("policy_logp" in token)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_with_a_calculator(text, pair, e):
    """Read back as a student would: differences, running sums, reward, sigmoid, loss, weight."""
    table = text(*pair, "--beta", "0.3", "--label-smoothing", str(e), "--every-token")
    log_ratios, sums = [], [0.0] * 3  # sums of the policy's, the reference's and their difference
    for role, numbers in re.findall(r"^ *\d+ (chosen|rejected|eos) .* yes +(.*)$", table, re.M):
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
        ("z or h, what the loss is a function of", z),
        ("sigma(z)", sigmoid),
        ("loss = -log sigma(z)", -(1 - e) * math.log(sigmoid) - e * math.log(1 - sigmoid)),
        ("gradient weight = beta * sigma(-z)", -0.3 * ((1 - e) * (1 - sigmoid) - e * sigmoid)),  # rejected's
    ):
        printed = re.search(rf"^  {re.escape(label)}.* ([-+\d.]+)$", table, re.M)[1]
        assert float(printed) == pytest.approx(number, abs=2e-4)
    assert ("smoothed, e = label_smoothing: (1-e) loss(z) + e loss(-z)" in table) == bool(e)


def test_own_loss(explained, text, pair, monkeypatch):
    """A new class is explained by what it says of itself, and by its value and weights."""

    @dataclass(frozen=True)
    class Squared(DPO):
        """The margin, squared.

        loss = z^2 / scale,    z as in DPO
        """

        name, saturates, z_is_logit = "squared", False, False
        equation, gradient = "z^2 / scale", "-2 beta (log-ratio of y_w - log-ratio of y_l) / scale"
        scale: float = setting(1.0, "divides the square", positive)

        def preference(self, pairs):
            return self.z(pairs).square() / self.scale

    monkeypatch.setitem(LOSSES, "squared", Squared)
    arguments = [*pair, "--loss", "squared", "--beta", "0.3", "--scale", "2"]
    mine, table = explained(*arguments), text(*arguments)
    loss = mine["loss"]
    assert mine["losses"][-1] == loss and "sigmoid" not in loss
    assert loss["loss"] == pytest.approx(loss["margin"] ** 2 / 2)
    assert loss["chosen_weight"] == pytest.approx(-0.3 * loss["margin"], rel=1e-6)
    assert "squared: The margin, squared.\n    loss = z^2 / scale,    z as in DPO\n  beta 0.3: str" in table
    assert f"loss = z^2 / scale{loss['loss']:>44.4f}" in table
    # A text too long for its column has a line of its own: the numbers stay in their columns.
    weights = f"{loss['chosen_weight']:>+64.6f}{loss['rejected_weight']:>+14.6f}"
    assert f"  gradient weight = {Squared.gradient}\n{weights}\n" in table


def test_long_texts(explained, text):
    """Long texts are abbreviated unless all tokens are asked for, and lines fit 100 columns."""
    response = " 日本 and" * 8 + "\\n" + " well" * 3
    arguments = ["--prompt", "a cat " * 15, "--chosen", response, "--rejected", " " + "no" * 45]
    mine, short, whole = explained(*arguments), text(*arguments), text(*arguments, "--every-token")
    scored = sum(token["scored"] for token in mine["tokens"])
    assert len(re.findall(r" yes +-", whole)) == scored and "left out" not in whole
    assert f"{len(mine['tokens']) - scored - 8} tokens left out" in short
    for role in ("chosen", "rejected"):
        left_out = mine[f"{role}_length"] - 40
        assert left_out > 2 and f"{role:<8} {left_out} tokens left out, counted in the sums" in short
    assert set(short.splitlines()) - set(whole.splitlines()) == set(re.findall(r".* left out.*", short))
    for loss in OF_ONE_PAIR:
        assert all(len(line) <= 100 for line in text(*arguments, "--loss", loss).splitlines())


def test_colour(explained, text, pair, monkeypatch):
    """Colour says how far the policy moved a token; it is on a terminal alone, and off with NO_COLOR."""
    mine = explained(*pair)
    moved = [token["difference"] for token in mine["tokens"] if abs(token.get("difference", 0)) >= 0.01]
    lines = [line for line in render(mine, True, every_token=True).splitlines() if RESET in line][1:]
    for difference, line in zip(moved, lines, strict=True):
        assert (GREEN in line) == (difference > 0) and (BOLD in line) == (abs(difference) >= 1)
        assert "\033" not in line.rpartition(RESET)[2]
    for terminal, no_color, coloured in ((True, "", True), (True, "1", False), (False, "", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        with monkeypatch.context() as patch:
            patch.setattr(command.sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
            assert (RESET in text(*pair)) == coloured


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a pair either as --data"),
        (["--data", "DATA", "--index", "1", "--prompt", "a"], "give a pair either as --data"),
        (["--data", "DATA"], "--index is missing"),
        (["--data", "DATA", "--index", "-1"], "--index -1"),
        (["--data", "DATA", "--index", "40"], "has 40 records; the last is 39"),
        (["--data", "nowhere.jsonl", "--index", "0"], "nowhere.jsonl: No such file"),
        (["--data", "BAD", "--index", "0"], "bad.jsonl:1: no key 'rejected'"),
        (["--data", "BAD", "--index", "1"], "bad.jsonl:3: nothing but blanks"),
        (["--prompt", "a", "--chosen", "b"], "all three"),
        ([*TEXTS, "--index", "0"], "no --index"),
        (["--prompt", "a", "--chosen", "b", "--rejected", " "], "nothing but blanks"),
        ([*TEXTS, "--max-length", "5"], "max_length = 5"),
        ([*TEXTS, "--max-length", "999"], "the model takes 256"),
        ([*TEXTS, "--reference", "nowhere"], "nowhere"),
        ([*TEXTS, "--reference", "FOREIGN"], "other ids than the model's"),
        ([*TEXTS, "--beta", "0"], "dpo: beta is 0.0; it must be > 0"),
        ([*TEXTS, "--loss", "cpo"], "--loss cpo: it must be one of " + ", ".join(LOSSES)),
        ([*TEXTS, "--loss", "kto"], "--loss kto: it compares with z0, a mean over a whole batch"),
        (
            [*TEXTS, "--margin-from-data"],
            "dpo with margin_from_data reads the record's margin, and this pair has none",
        ),
        ([*TEXTS, "--gamma", "2"], "the loss dpo has no such setting; it has --beta, --label-smoothing"),
        ([*TEXTS, "--loss", "sft", "--beta", "2"], "the loss sft has no such setting; it has no settings"),
    ],
)
def test_refused(explained, world, tmp_path, arguments, says):
    """What cannot be explained is refused in one line."""
    places = {"DATA": world / "pairs.jsonl.gz", "FOREIGN": tmp_path}
    places["BAD"] = write(tmp_path / "bad.jsonl", {"chosen": 1}, "", {**GOOD, "chosen": " "})
    write_tokenizer(tmp_path, ["Human: a cat"], vocabulary=290)
    save_model(tiny_model(vocab_size=300), tmp_path)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        explained(*[str(places.get(argument, argument)) for argument in arguments])
    assert "\n" not in str(error.value)


def test_turns(explained, text, world, tmp_path):
    """What others said in a response has no log-prob, and the sums are those of the other tokens."""
    said = (("assistant", "a cat"), ("user", "no"), ("assistant", "it runs"))
    chosen = [{"role": role, "content": content} for role, content in said]
    record = {"prompt": [{"role": "user", "content": "a?"}], "chosen": chosen, "rejected": chosen[2:]}
    arguments = ["--data", str(write(tmp_path / "a.jsonl", record)), "--index", "0", "--template", "hh"]
    mine = explained(*arguments)
    tokens = [token for token in mine["tokens"] if token["response"] == "chosen"]
    others = [token for token in tokens if token["role"] == "other"]
    assert "".join(token["text"] for token in others) == "\n\nHuman: no\n\nAssistant:"
    for token in tokens:
        assert token["scored"] == (token["role"] != "other") == ("policy_logp" in token)
    scored = [token["policy_logp"] for token in tokens if token["scored"]]
    assert mine["chosen_length"] == len(scored) == len(tokens) - len(others)
    assert mine["chosen_logps"] == tokens[-1]["policy_sum"] == pytest.approx(sum(scored), rel=1e-5)
    out = tmp_path / "scores.jsonl"
    score(
        [
            "--model",
            str(world / "model"),
            *arguments[:2],
            *arguments[4:],
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
    )
    assert read(out) == [{name: mine[name] for name in read(out)[0]}]
    rejected = [token for token in mine["tokens"] if token["response"] == "rejected"]
    assert mine["rejected_logps"] == rejected[-1]["policy_sum"] and mine["rejected_length"] == len(rejected)
    table = text(*arguments, "--every-token")
    assert len(re.findall(r"^ *\d+ other .* no$", table, re.M)) == len(others)
    prompt = len(mine["tokens"]) - len(tokens) - len(rejected)
    lengths = f"{prompt} tokens of prompt, {len(tokens)} of chosen, {len(rejected)} of rejected"
    assert f"{lengths} ({len(others)} by others, not scored); nothing is cut off" in table


def test_one_response(explained, text, tmp_path):
    """A record of one response has its own half of the table, under the losses that read one."""
    single = {"prompt": "a cat", "completion": " yes"}
    pair = {"prompt": "a cat", "chosen": " yes", "rejected": " no"}
    one, two = (
        ("--data", str(write(tmp_path / name, record)), "--index", "0", "--loss")
        for name, record in (("one.jsonl", single), ("two.jsonl", pair))
    )
    both, mine, table = explained(*two, "sft"), explained(*one, "sft"), text(*one, "sft")
    assert mine["chosen_logps"] == both["chosen_logps"] and mine["loss"] == both["loss"]
    assert "rejected_logps" not in mine and "chosen - rejected" not in table
    of_one = {name for name, loss in LOSSES.items() if loss.responses == 1 and not loss.needs_z0}
    assert {loss["name"] for loss in mine["losses"]} == of_one
    with pytest.raises(UserError, match="dpo compares 2 responses, and the record has 1; give --loss sft"):
        text(*one, "dpo")
