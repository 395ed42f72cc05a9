"""`python -m minidpo score`: every pair that fits, in file order, equal to transformers."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from minidpo.data import Tokenizer, read_preferences
from minidpo.errors import UserError
from minidpo.tools.score import calibration
from minidpo.tools.score import main as score

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def scores(tmp_path: Path, *arguments: str) -> list[dict]:
    out = tmp_path / "scores.jsonl"
    score([*arguments, "--out", str(out), "--device", "cpu"])
    return [json.loads(line) for line in out.read_text().splitlines()]


@needs_shared
def test_equals_transformers(tmp_path):
    """On real pairs the log-probs are those of transformers."""
    transformers = pytest.importorskip("transformers")
    stories, data = SHARED / "models/stories260k", tmp_path / "hh.jsonl"
    with gzip.open(SHARED / "data/hh/helpful-base.test.jsonl.gz", "rt") as file:
        data.write_text("".join(line for line, _ in zip(file, range(80), strict=False)))
    rows = scores(tmp_path, "--model", str(stories), "--data", str(data))
    assert len(rows) >= 50  # pairs that fit 512 tokens
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories).eval()
    tokenizer = Tokenizer.from_pretrained(stories)
    pairs = {pair.index: tokenizer.encode_pair(pair) for pair in read_preferences(data)}
    for row in rows:
        pair = pairs[row["index"]]
        for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            tokens = torch.tensor([pair.prompt + response])
            with torch.no_grad():
                logps = theirs(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            summed = logps[len(pair.prompt) - 1 :].double().sum().item()
            assert row[f"{name}_logps"] == pytest.approx(summed, rel=1e-7, abs=1e-4)
            assert row[f"{name}_length"] == len(response)


def test_every_pair(world, tmp_path):
    """Every pair is scored, identical ones too, in file order."""
    data = tmp_path / "pairs.jsonl"
    same = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " yes", "rejected": " yes"}
    longer = same | {"chosen": " yes and no and yes and no"}
    data.write_text("\n".join(map(json.dumps, [longer, same, longer, same])))
    rows = scores(tmp_path, "--model", str(world / "model"), "--data", str(data))
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["chosen_logps"] == pytest.approx(rows[1]["rejected_logps"], abs=1e-5)


def test_too_long(world, tmp_path, capsys):
    """A pair too long for max_length is left out and counted, never cut."""
    data = world / "pairs.jsonl.gz"
    every = scores(tmp_path, "--model", str(world / "model"), "--data", str(data))
    some = scores(tmp_path, "--model", str(world / "model"), "--data", str(data), "--max-length", "45")
    assert 0 < len(some) < len(every) == 40
    assert "longer than max_length" in capsys.readouterr().out
    by_index = {row["index"]: row for row in every}
    for row in some:
        assert row["chosen_logps"] == pytest.approx(by_index[row["index"]]["chosen_logps"], rel=1e-5)


def test_micro_tokens(world, tmp_path):
    """micro_tokens changes nothing but rounding, even where a pair is longer than it."""
    common = ["--model", str(world / "model"), "--reference", str(world / "other")]
    common += ["--data", str(world / "pairs.jsonl.gz")]
    for a, b in zip(
        scores(tmp_path, *common), scores(tmp_path, *common, "--micro-tokens", "80"), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-5)
        assert a["reference_chosen_logps"] != a["chosen_logps"]


def test_refusals(world, tmp_path):
    """What cannot work is refused before any scoring."""
    common = ["--model", str(world / "model"), "--data", str(world / "pairs.jsonl.gz")]
    for arguments, says in (
        (["--out", str(tmp_path / "no" / "s.jsonl")], "a file in a directory that exists"),
        (["--out", str(tmp_path / "s.jsonl"), "--max-length", "0"], "at least 2"),
        (["--out", str(tmp_path / "s.jsonl"), "--max-length", "999"], "the model takes 256"),
        (["--out", str(tmp_path / "s.jsonl"), "--reference", "nowhere"], "nowhere"),
    ):
        with pytest.raises(UserError, match=says):
            score([*common, *arguments])
    assert not list(tmp_path.iterdir())


def test_bad_data(world, tmp_path):
    """Nothing is written when the data cannot be read."""
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: no key 'rejected'"):
        scores(tmp_path, "--model", str(world / "model"), "--data", str(data))
    assert not (tmp_path / "scores.jsonl").exists()


# --- the summary --------------------------------------------------------------------------------------------


def printed(capsys, tmp_path: Path, *arguments: str) -> tuple[list[dict], str]:
    capsys.readouterr()
    rows = scores(tmp_path, *arguments)
    return rows, capsys.readouterr().out


def test_accuracy_and_margin(world, tmp_path, capsys):
    """Accuracy and mean margin come with their standard errors."""
    common = ["--model", str(world / "model"), "--data", str(world / "pairs.jsonl.gz")]
    rows, text = printed(capsys, tmp_path, *common, "--reference", str(world / "other"), "--beta", "0.7")
    margins = [
        0.7 * (r["chosen_logps"] - r["reference_chosen_logps"])
        - 0.7 * (r["rejected_logps"] - r["reference_rejected_logps"])
        for r in rows
    ]
    n = len(margins)
    p, mean = sum(m > 0 for m in margins) / n, sum(margins) / n
    spread = sum((m - mean) ** 2 for m in margins) / n
    assert 0 < p < 1
    assert f"{p:.3f} ± {(p * (1 - p) / n) ** 0.5:.3f}" in text
    found = re.search(r"^  all .* (-?\d+\.\d{4}) ± (\d+\.\d{4})$", text, re.M)
    assert [float(number) for number in found.groups()] == pytest.approx(
        [mean, (spread / n) ** 0.5], abs=2e-4
    )
    assert "beta 0.7" in text
    assert "expected calibration error" in text
    assert "beta 0.1" in printed(capsys, tmp_path, *common, "--reference", str(world / "other"))[1]
    assert "calibration error" not in printed(capsys, tmp_path, *common)[1]  # log-probs alone are no reward


def test_ties(world, tmp_path, capsys):
    """A model equal to its reference has accuracy 0, and the ties are told."""
    model = str(world / "model")
    common = ["--model", model, "--reference", model, "--data", str(world / "pairs.jsonl.gz")]
    text = printed(capsys, tmp_path, *common)[1]
    assert re.search(r"^  all +40   0.000 ± 0.000", text, re.M)
    assert "(40 margins are 0 and count as wrong)" in text


def test_by(world, tmp_path, capsys):
    """--by splits the pairs by a field of their records."""
    data = tmp_path / "pairs.jsonl"
    prompt = {"prompt": "\n\nHuman: a\n\nAssistant:"}
    records = [
        prompt | {"chosen": " a" * k, "rejected": " b", "chat": chat, "id": k}
        for k, chat in enumerate(["help", "harm", "help", None, 3], start=1)
    ]
    records.insert(1, prompt | {"chosen": " ", "rejected": "b", "chat": "dropped"})
    del records[4]["chat"]
    data.write_text("\n".join(map(json.dumps, records)))
    common = ["--model", str(world / "model"), "--data", str(data)]
    rows, text = printed(capsys, tmp_path, *common, "--by", "chat")
    better = {row["index"]: row["chosen_logps"] > row["rejected_logps"] for row in rows}
    groups = dict(re.findall(r"^  (\S+) +(\d+   \d\.\d{3}) ±", text, re.M))
    assert groups["help"] == f"2   {(better[0] + better[3]) / 2:.3f}"
    assert groups["harm"] == f"1   {better[2]:.3f}"
    assert groups["(none)"] == f"1   {better[4]:.3f}"
    assert groups["3"] == f"1   {better[5]:.3f}"
    assert "dropped" not in groups
    with pytest.raises(UserError, match="--by topic: no scored record of .* has such a field"):
        scores(tmp_path, *common, "--by", "topic")
    data.write_text(
        "".join(json.dumps(prompt | {"chosen": " a", "rejected": " b", "id": k}) + "\n" for k in range(51))
    )
    with pytest.raises(UserError, match="--by id: 51 different values"):
        scores(tmp_path, *common, "--by", "id")


def test_longer_response(world, tmp_path, capsys):
    """The longer response is a baseline that tells its ties."""
    data = tmp_path / "pairs.jsonl"
    texts = [(" yes and yes", " no"), (" yes", " yes and yes"), (" yes", " yes"), (" no", " no")]
    data.write_text("".join(json.dumps({"prompt": "a", "chosen": c, "rejected": r}) + "\n" for c, r in texts))
    text = printed(capsys, tmp_path, "--model", str(world / "model"), "--data", str(data))[1]
    assert re.search(r"longer response +4   0.500 ± 0.177    2 ties, each counted as half", text)
    assert re.search(r"a coin +0.500", text)


def test_calibration():
    """A calibrated model is found calibrated and a boastful one is not.

    Labels drawn with the model's own probabilities: observed follows predicted. Margins tripled: it does not.
    """
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 1.5, 40_000)
    margins = np.where(draw.random(40_000) < 1 / (1 + np.exp(-logits)), logits, -logits)
    table, error = calibration(margins)
    assert sum(n for _, n, _, _ in table) == 40_000
    for low, n, predicted, observed in table:
        assert low <= predicted <= low + 0.05
        assert abs(observed - predicted) < 4 * (0.25 / n) ** 0.5
    assert error < 0.01
    assert calibration(3 * margins)[1] > 0.1


def test_calibration_by_hand():
    """Two pairs in a bin, one right: predicted 0.62, observed 0.5; a tie is half right."""
    logit = np.log(0.62 / 0.38)
    table, error = calibration(np.array([logit, -logit, 0.0, 800.0]))
    assert table == [
        (0.5, 1, pytest.approx(0.5), 0.5),
        (0.6, 2, pytest.approx(0.62), 0.5),
        (0.95, 1, pytest.approx(1.0), 1.0),
    ]
    assert error == pytest.approx(0.5 * 0.12)


def test_bad_beta(world, tmp_path):
    """--beta is refused without a reference, and where it is no positive number."""
    common = ["--model", str(world / "model"), "--data", str(world / "pairs.jsonl.gz")]
    with pytest.raises(UserError, match="--beta goes with --reference"):
        scores(tmp_path, *common, "--beta", "0.1")
    with pytest.raises(UserError, match="--beta nan; it must be > 0"):
        scores(tmp_path, *common, "--reference", str(world / "other"), "--beta", "nan")
