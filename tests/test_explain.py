"""`python -m minidpo explain`: its numbers are those of `score` and of training, and can be checked by hand."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

import train_dpo
from minidpo import objective
from minidpo.commands import explain as command
from minidpo.commands import explain_text
from minidpo.commands.explain import EVERY_LOSS, under
from minidpo.commands.explain import main as explain
from minidpo.commands.explain_text import RESET, render
from minidpo.commands.score import main as score
from minidpo.errors import UserError
from minidpo.losses import dpo_loss
from minidpo.metrics import console_line
from minidpo.objective import watch
from minidpo.sections import LOSS_READS, PreferenceLossSection
from minidpo.weights import save_model
from tiny import tiny_model, write_tokenizer

TEXTS = ["--prompt", "\\n\\nHuman: a cat\\n\\nAssistant:", "--chosen", " yes", "--rejected", " no\\nno"]
NUMBERS = ("policy_logp", "reference_logp", "difference", "policy_sum", "reference_sum", "difference_sum")


@pytest.fixture
def explained(world, capsys):
    """The JSON object of `explain` for the arguments given, on CPU, and the table for the same with text()."""

    def printed(*arguments: str) -> str:
        capsys.readouterr()  # what came before is not ours
        explain(["--model", str(world / "model"), "--device", "cpu", *arguments])
        return capsys.readouterr().out

    class Explained:
        text = staticmethod(printed)

        def __call__(self, *arguments: str) -> dict:
            return json.loads(printed("--json", *arguments))

    return Explained()


@pytest.fixture
def pair(world):
    """Arguments for record 7 of the world, with a reference."""
    return ["--data", str(world / "pairs.jsonl.gz"), "--index", "7", "--reference", str(world / "other")]


def test_the_sums_are_those_of_score_to_the_last_digit(world, explained, pair, tmp_path):
    """Alone in a packed row to the last bit; among other pairs to the last printed digit."""
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
    table = explained.text(*pair)
    for name in ("chosen", "rejected"):
        assert f" {row[f'{name}_logps']:.4f}" in table
        assert f" {row[f'reference_{name}_logps']:.4f}" in table


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "sft"])
def test_the_loss_is_that_of_the_first_logged_step_to_the_last_digit(
    config, explained, tmp_path, name, world
):
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
    table = explained.text(*models)
    assert all(f" {number}\n" in table or f" {number} " in table for number in logged)
    if name != "sft":
        assert len(logged) == 4
        for key in ("chosen", "rejected", "margins"):
            assert mine[{"margins": "margin"}.get(key, f"{key}_reward")] == step[f"rewards/{key}"]


def on_paper(loss, policy, reference, lengths) -> tuple[float, list[float]]:
    """A pair's argument and gradient weights in closed form, as the last lines of the table name them."""
    values = policy if loss.name in ("simpo", "sft") else policy - reference
    over = 1.0
    if loss.length_normalize or loss.name in ("simpo", "sft"):
        values, over = values / lengths, lengths[0]
    if loss.name == "sft":
        return values[0, 0].item(), [1 / lengths[0, 0].item(), 0.0]
    h = (values[0, 0] - values[0, 1]).item()
    z = loss.beta * h - (loss.gamma if loss.name == "simpo" else 0)
    e = loss.label_smoothing
    pull = loss.beta * ((1 - e) / (1 + math.exp(z)) - e / (1 + math.exp(-z)))
    if loss.name == "ipo":
        pull = 2 * (1 / (2 * loss.beta) - h)
    return h if loss.name == "ipo" else z, (pull * torch.tensor([1.0, -1.0]).double() / over).tolist()


@pytest.mark.parametrize(
    "loss", [*EVERY_LOSS, replace(EVERY_LOSS[5], label_smoothing=0.2, gamma=0.3)], ids=repr
)
def test_argument_and_gradient_weights_are_those_on_paper(loss):
    draw = torch.Generator().manual_seed(0)
    for _ in range(6):
        policy, reference = (
            -20 * torch.rand(1, 2, generator=draw, dtype=torch.float64) - 1 for _ in range(2)
        )
        lengths = torch.randint(1, 9, (1, 2), generator=draw)
        found = under(loss, policy, reference, lengths)
        argument, weights = on_paper(loss, policy, reference, lengths)
        assert found["argument"] == pytest.approx(argument, rel=1e-12)
        assert [found["chosen_weight"], found["rejected_weight"]] == pytest.approx(weights, rel=1e-9)
        if "sigmoid" in found:
            e, s = loss.label_smoothing, found["sigmoid"]
            assert found["loss"] == pytest.approx(-(1 - e) * math.log(s) - e * math.log(1 - s), rel=1e-9)


def test_a_loss_without_lines_of_its_own_is_explained_by_margin_loss_and_weights(
    explained, pair, monkeypatch
):
    def squared(loss, policy, reference, lengths):
        result = dpo_loss(*policy.unbind(1), *reference.unbind(1), loss.beta)
        return (loss.beta * (policy - reference) @ torch.tensor([1.0, -1.0]).to(policy)) ** 2, watch(result)

    monkeypatch.setitem(LOSS_READS, "squared", {"beta"})
    monkeypatch.setattr(explain_text, "NEEDS_REFERENCE", ("squared",))
    monkeypatch.setattr(
        PreferenceLossSection.__dataclass_fields__["name"], "metadata", {"about": "", "check": None}
    )
    real = objective.preference
    new = lambda loss, *rest: (squared if loss.name == "squared" else real)(loss, *rest)  # noqa: E731
    monkeypatch.setattr(objective, "preference", new)
    monkeypatch.setattr(command, "preference", new)
    everything = explained(*pair, "--loss", "squared", "--beta", "0.3")
    mine = everything["loss"]
    assert everything["losses"][-1] == mine and len(everything["losses"]) == len(EVERY_LOSS) + 1
    assert mine["loss"] == pytest.approx(mine["margin"] ** 2)
    assert mine["chosen_weight"] == pytest.approx(-2 * 0.3 * mine["margin"], rel=1e-6)
    text = explained.text(*pair, "--loss", "squared", "--beta", "0.3")
    assert f"loss of squared{mine['loss']:>47.4f}" in text


def test_the_settings_are_those_of_the_run_whose_final_the_model_is(config, explained, pair, tmp_path):
    train_dpo.main([*config(optim__max_steps=1), "--loss.beta=0.37", "--loss.label_smoothing=0.2"])
    of_run = ["--model", str(tmp_path / "out" / "final"), *pair]
    loss = explained(*of_run)["loss"]
    assert (loss["name"], loss["beta"], loss["label_smoothing"]) == ("dpo", 0.37, 0.2)
    assert f"as {tmp_path / 'out' / 'config.toml'} says" in explained.text(*of_run)
    assert explained(*of_run, "--beta", "0.5")["loss"]["beta"] == 0.5
    assert explained(*of_run, "--loss", "ipo")["loss"]["beta"] == 0.1
    assert explained(*pair)["loss"]["beta"] == 0.1


def test_the_table_can_be_checked_with_a_calculator(explained, pair):
    """Read back as a student would: differences, running sums, log-ratios, reward, sigmoid, loss, weight."""
    text = explained.text(*pair, "--beta", "0.3", "--every-token")
    rows = re.findall(r"^ *\d+ (chosen|rejected|eos) .* yes +(.*)$", text, re.M)
    ending, sums = -1, [0.0] * 3
    totals = {}
    for role, numbers in rows:
        policy, reference, difference, *running = map(float, numbers.split())
        assert policy - reference == pytest.approx(difference, abs=2e-4)
        if ending == -1:
            sums, ending = [0.0] * 3, 0
        sums = [a + b for a, b in zip(sums, (policy, reference, difference), strict=True)]
        assert running == pytest.approx(sums, abs=1e-3 * len(rows))
        if role == "eos":
            totals[len(totals)], ending = running, -1

    def value(label: str) -> float:
        return float(re.search(rf"^  {re.escape(label)} +(\S+)", text, re.M)[1])

    margin = 0.3 * (totals[0][2] - totals[1][2])
    assert value("margin, of the rewards") == pytest.approx(margin, abs=2e-4)
    sigmoid = 1 / (1 + math.exp(-margin))
    assert value("sigmoid(z)") == pytest.approx(sigmoid, abs=1e-4)
    assert value("loss = -log sigmoid(z)") == pytest.approx(-math.log(sigmoid), abs=2e-4)
    assert value("gradient weight = beta * sigmoid(-z)") == pytest.approx(0.3 * (1 - sigmoid), abs=1e-4)


def test_without_a_reference_every_log_ratio_is_0_and_the_output_says_so(explained, pair):
    mine = explained(*pair[:4])
    assert mine["reference"] is None
    assert {token["difference"] for token in mine["tokens"] if token["scored"]} == {0.0}
    assert mine["loss"]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    text = explained.text(*pair[:4])
    assert "the policy itself (no --reference): every log-ratio is 0" in text
    assert "the policy itself" not in explained.text(*pair)


def test_only_endings_are_scored_and_every_token_is_there(world, explained):
    mine = explained(*TEXTS)
    assert [token["scored"] for token in mine["tokens"]] == [
        token["ending"] is not None for token in mine["tokens"]
    ]
    assert all(set(NUMBERS) <= set(token) for token in mine["tokens"] if token["scored"])
    assert not any(set(NUMBERS) & set(token) for token in mine["tokens"] if not token["scored"])
    text = "".join(token["text"] for token in mine["tokens"])
    assert text == "<s>\n\nHuman: a cat\n\nAssistant: yes</s> no\nno</s>"
    assert (mine["prompt"], mine["rejected"]) == ("\n\nHuman: a cat\n\nAssistant:", " no\nno")


def test_long_texts_are_abbreviated_unless_all_is_asked_for_and_lines_fit_100_columns(explained):
    prompt, ending = "a cat " * 15, " 日本 and" * 8 + "\\n" + " well" * 3
    arguments = ["--prompt", prompt, "--chosen", ending, "--rejected", " " + "no" * 45]
    mine, text = explained(*arguments), explained.text(*arguments)
    prompt_length = sum(not token["scored"] for token in mine["tokens"])
    assert f"{prompt_length - 8} tokens left out" in text
    assert len(re.findall(r"^ *\d+ prompt ", text, re.M)) == 8
    whole = explained.text(*arguments, "--every-token")
    assert len(re.findall(r" yes +-", whole)) == len(mine["tokens"]) - prompt_length
    assert "'\\n'" in whole and "left out" not in whole
    for role, length in (("chosen", mine["chosen_length"]), ("rejected", mine["rejected_length"])):
        assert length > 42 and f"{role:<8} {length - 40} tokens left out, counted in the sums" in text
    assert set(text.splitlines()) - set(whole.splitlines()) == set(re.findall(r".* left out.*", text))
    for loss in ("dpo", "ipo", "simpo", "sft"):
        lines = explained.text(*arguments, "--loss", loss).splitlines()
        assert max(map(len, lines)) <= 100
        assert not [line for line in lines if line != line.rstrip()]
    assert "left out" not in explained.text("--prompt", "a cat", *TEXTS[2:])


@pytest.mark.parametrize(("terminal", "no_color", "coloured"), [(1, "", 1), (1, "1", 0), (0, "", 0)])
def test_colour_only_on_a_terminal_without_no_color(
    explained, pair, monkeypatch, terminal, no_color, coloured
):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(command.sys.stdout, "isatty", lambda: bool(terminal), raising=False)
    text = explained.text(*pair)
    assert ("\033[" in text) == bool(coloured)
    for line in text.splitlines():  # what is switched on is switched off
        assert "\033[" not in line.rpartition(RESET)[2]


def test_colour_follows_how_far_the_policy_moved_a_token(explained, pair):
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
        ([*TEXTS, "--max-length", "5"], "max_length is 5"),
        ([*TEXTS, "--max-length", "999"], "the model takes 256"),
        ([*TEXTS, "--reference", "nowhere"], "nowhere"),
        ([*TEXTS, "--reference", "SMALL"], "they do not belong together"),
        ([*TEXTS, "--reference", "FOREIGN"], "other ids than the model's"),
        ([*TEXTS, "--beta", "0"], "loss.beta = 0.0; it must be > 0"),
        ([*TEXTS, "--loss", "kto"], "one of dpo, ipo, simpo, sft"),
        ([*TEXTS, "--gamma", "2"], "no meaning for loss.name = 'dpo'"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(explained, world, tmp_path, arguments, says):
    places = {"DATA": str(world / "pairs.jsonl.gz"), "SMALL": str(tmp_path / "small")}
    write_tokenizer(tmp_path / "small", ["a"])
    save_model(tiny_model(vocab_size=61), tmp_path / "small")
    places["FOREIGN"] = str(tmp_path / "foreign")
    write_tokenizer(tmp_path / "foreign", ["Human: a cat"], vocabulary=290)
    save_model(tiny_model(vocab_size=300), tmp_path / "foreign")
    with pytest.raises(UserError, match=re.escape(says)) as error:
        explained(*[places.get(argument, argument) for argument in arguments])
    assert "\n" not in str(error.value)


def test_a_record_that_teaches_nothing_is_refused_with_its_line_and_others_do_not_matter(explained, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"chosen": 1}\n\n{"prompt": "a", "chosen": " ", "rejected": "b"}\n'
                    '{"prompt": "a", "chosen": "b", "rejected": "b"}\n')  # fmt: skip
    with pytest.raises(UserError, match=r"pairs.jsonl:3: nothing but blanks"):
        explained("--data", str(data), "--index", "1")
    with pytest.raises(UserError, match=r"pairs.jsonl:1: no key 'rejected'"):
        explained("--data", str(data), "--index", "0")
    assert explained("--data", str(data), "--index", "2")["chosen"] == "b"
