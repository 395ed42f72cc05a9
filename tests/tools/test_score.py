"""`python -m minidpo score`: every whole pair in file order, and what the set shows."""

import math
import re
import shutil

import numpy as np
import pytest
from safetensors.torch import save_file

from minidpo.data import read_preferences
from minidpo.errors import UserError
from minidpo.tools.explain import main as explain
from minidpo.tools.reading import cut_in_training
from minidpo.tools.sample import main as sample
from minidpo.tools.score import main as score
from padded import saved_weights
from record_files import GOOD, read, write
from runs import run_dpo


@pytest.fixture
def scored(world, tmp_path, capsys):
    """Runs `score`; returns the rows that it writes and what it prints."""

    def run(*arguments: object, model=world / "model", data=world / "pairs.jsonl.gz") -> tuple[list, str]:
        out = tmp_path / "scores.jsonl"
        capsys.readouterr()  # What came before is not of this command.
        typed = ("--model", model, "--data", data, "--out", out, "--device", "cpu", *arguments)
        score(list(map(str, typed)))
        return read(out), capsys.readouterr().out

    return run


def test_whole_pairs(scored, tmp_path):
    """Every pair is scored in file order, identical ones too; what is too long is left out, never cut."""
    same, longer = {**GOOD, "rejected": "c"}, {**GOOD, "chosen": "c and c and c"}
    data = write(tmp_path / "pairs.jsonl", longer, same, longer, same)
    assert [row["index"] for row in scored(data=data)[0]] == [0, 1, 2, 3]
    short, text = scored("--max-length", 5, data=data)
    assert [row["index"] for row in short] == [1, 3] and "longer than max_length" in text


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (score, "--model {bad} --data {data} --out {out}"),
        (score, "--model {good} --reference {bad} --data {data} --out {out}"),
        (sample, "--model {bad} --prompt a --out {out}"),
        (sample, "--model {bad} --prompt a --temperature 0"),
        (explain, "--model {bad} --prompt a --chosen b --rejected c --json"),
        (explain, "--model {good} --reference {bad} --prompt a --chosen b --rejected c"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, 3e38])
def test_not_finite(world, tmp_path, capsys, command, arguments, value):
    """A model whose numbers are not finite is refused in one line, and nothing is written."""
    bad, out = tmp_path / "bad", tmp_path / "out.jsonl"
    shutil.copytree(world / "model", bad)
    weights = saved_weights(bad)
    weights["lm_head.weight"][7] = value
    save_file(weights, bad / "model.safetensors")
    arguments = arguments.format(good=world / "model", bad=bad, data=world / "pairs.jsonl.gz", out=out)
    with pytest.raises(UserError, match="not finite: some of its weights are nan"):
        command([*arguments.split(), "--device", "cpu"])
    assert not out.exists() and "nan" not in capsys.readouterr().out


def test_accuracy_and_margin(scored, world):
    """Accuracy and mean margin come with their standard errors."""
    reference = ("--reference", world / "other")
    rows, text = scored(*reference, "--beta", "0.7")
    names = ("chosen_logps", "rejected_logps", "reference_rejected_logps", "reference_chosen_logps")
    values, n = np.array([[row[name] for name in names] for row in rows]), len(rows)
    margins = 0.7 * values @ [1, -1, 1, -1]
    p, mean = (margins > 0).mean(), margins.mean()
    error = math.sqrt(((margins - mean) ** 2).sum() / (n - 1) / n)
    assert f"{p:.3f} ± {math.sqrt(p * (1 - p) / (n - 1)):.3f}" in text
    printed = re.search(r"^  all .* (-?\d+\.\d{4}) ± (\d+\.\d{4})$", text, re.M).groups()
    assert list(map(float, printed)) == pytest.approx([mean, error], abs=2e-4)
    assert "beta 0.7" in text and "beta 0.1" in scored(*reference)[1]


def test_of_training(scored, world, tmp_path):
    """One line says that the run trained on the file, another how many of its pairs training cuts."""
    data = write(tmp_path / "pairs.jsonl", GOOD, {**GOOD, "prompt": "p" * 9})
    model, config = tmp_path / "run" / "final", tmp_path / "run" / "config.toml"
    shutil.copytree(world / "model", model)
    settings = "eval_pairs = 1\nmax_length = 10\nmax_prompt_length = 6\n"
    config.write_text(f'[data]\ntrain = ["gone.jsonl", "{data}"]\n{settings}')
    text, copied = scored(model=model, data=data)[1], shutil.copy(data, tmp_path / "copied.jsonl")
    known = f"trained on {data} (data.train in {config}), but for about 1 pairs that"
    assert known in text and "trained on" not in scored(model=model, data=copied)[1]
    limits = "data.max_length = 10, data.max_prompt_length = 6"
    assert f"1 pairs are scored whole, but training cuts them ({limits})" in text
    # 6 + 4 fit into 10. Cut are a prompt of 7, and a response of 5 after a prompt of 6, chosen or rejected.
    lengths = np.array([[6, 4, 4], [7, 1, 1], [6, 5, 1], [6, 1, 5]])
    assert [cut_in_training(model, row[None])[0] for row in lengths] == [0, 1, 1, 1]
    assert cut_in_training(world / "model", np.array([[9999, 1, 1]]))[0] == 0  # made by no run


@pytest.mark.parametrize(
    "settings",
    [["--loss.name=dpo", "--loss.length_normalize=true"], ["--loss.name=ipo"], ["--loss.name=simpo"]],
)
def test_loss_of_the_run(scored, world, config, tmp_path, settings):
    """The margin is the run's own, of final/ and of a checkpoint; SimPO needs no reference."""
    arguments = config(data__eval=f'["{world / "pairs.jsonl.gz"}"]', run__save_every=1, optim__lr=0.01)
    of_run = run_dpo(arguments, "--loss.beta=0.3", *settings)[-1]["eval/rewards/margins"]
    assert abs(of_run) > 1e-3
    reference = [] if "simpo" in settings[0] else ["--reference", world / "model"]
    out = tmp_path / "out"
    for model, beta in (("final", 0.3), ("checkpoints/step-4", 0.3), ("final", 0.6)):
        changed = ["--beta", beta] if beta != 0.3 else []
        _, text = scored(*reference, *changed, model=out / model)
        printed = re.search(r"^  all .* (-?\d+\.\d{4}) ±", text, re.M)[1]
        assert float(printed) == pytest.approx(of_run * beta / 0.3, abs=1e-4)
        assert f"as {out / 'config.toml'} says" in text


def test_model_of_sft(scored, world, config, tmp_path):
    """The loss of an SFT run compares nothing: its margin is DPO's."""
    run_dpo(config(optim__max_steps=1), "--loss.name=sft")
    _, text = scored("--reference", world / "other", model=tmp_path / "out" / "final")
    assert "under dpo, beta 0.1 (the defaults)" in text


def test_by(scored, tmp_path):
    """--by splits the pairs by a field of their records; a record that is dropped is in no group."""
    kinds = ["help", "dropped", "harm", "help", 3]
    records = [{**GOOD, "chosen": " a" * k, "kind": kind} for k, kind in enumerate(kinds, start=1)]
    records[1]["chosen"] = " "
    rows, text = scored("--by", "kind", data=write(tmp_path / "pairs.jsonl", *records, GOOD))
    right = {row["index"]: row["chosen_logps"] > row["rejected_logps"] for row in rows}
    groups = dict(re.findall(r"^  (\S+) +(\d+ +\d\.\d)", text, re.M))
    expected = {"help": (right[0] + right[3]) / 2, "harm": right[2], "(none)": right[5], "3": right[4]}
    assert groups.pop("all") and groups.keys() == expected.keys()
    for name, share in expected.items():
        assert groups[name].split() == ["2" if name == "help" else "1", f"{share:.1f}"]


def test_ties(scored, world, tmp_path):
    """A model equal to its reference has accuracy 0: every pair ties. Of lengths, a tie counts half."""
    texts = [(" yes and yes", " no"), (" yes", " yes and yes"), (" yes", " yes"), (" no", " no")]
    records = ({"prompt": "a", "chosen": chosen, "rejected": rejected} for chosen, rejected in texts)
    data = write(tmp_path / "pairs.jsonl", *records)
    _, text = scored("--reference", world / "model", data=data)
    assert re.search(r"^  all +4 +0.000 ± 0.000", text, re.M) and "(4 margins are 0" in text
    # Squared distances from 0.5: 0.25, 0.25, 0, 0. Variance 0.5 / 3; sqrt(0.1667 / 4) = 0.204.
    assert re.search(r"longer response +4 +0.500 ± 0.204$", text, re.M) and "2 lengths are equal" in text


def test_one_response(scored, world, tmp_path):
    """Of records with one response, the log-probs are those of chosen; there is nothing to compare."""
    pairs = read_preferences(world / "pairs.jsonl.gz", drop_identical=False)
    records = ({"prompt": pair.prompt, "completion": pair.chosen} for pair in pairs)
    data = write(tmp_path / "one.jsonl", *records)
    (two, _), (one, text) = scored(), scored(data=data)
    for row, pair in zip(one, two, strict=True):
        assert row == pytest.approx({name: pair[name] for name in row}, abs=5e-5)
    mean = np.mean([row["chosen_logps"] / row["chosen_length"] for row in one])
    assert f"mean log-prob of a token, per response {mean:.4f} ± " in text and "accuracy" not in text
    for option in (["--by", "prompt"], ["--beta", "0.1", "--reference", world / "other"]):
        with pytest.raises(UserError, match="--by and --beta are for pairs, and the records of .* have one"):
            scored(*option, data=data)
