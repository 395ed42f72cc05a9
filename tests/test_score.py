"""`python -m minidpo score`: every pair that fits, in file order, equal to transformers."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from minidpo.commands.score import main as score
from minidpo.data import read_preferences
from minidpo.errors import UserError
from minidpo.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")


def scores(tmp_path: Path, *arguments: str) -> list[dict]:
    out = tmp_path / "scores.jsonl"
    score([*arguments, "--out", str(out), "--device", "cpu"])
    return [json.loads(line) for line in out.read_text().splitlines()]


@needs_shared
def test_score_on_real_pairs_equals_transformers_log_probs(tmp_path):
    transformers = pytest.importorskip("transformers")
    stories, data = SHARED / "models/stories260k", tmp_path / "hh.jsonl"
    with gzip.open(SHARED / "data/hh/helpful-base.test.jsonl.gz", "rt") as file:
        data.write_text("".join(line for line, _ in zip(file, range(80), strict=False)))
    rows = scores(tmp_path, "--model", str(stories), "--data", str(data))
    assert len(rows) >= 50  # pairs that fit 512 tokens
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories).eval()
    tokenizer = Tokenizer.from_directory(stories)
    pairs = {pair.index: tokenizer.encode_pair(pair) for pair in read_preferences(data)}
    for row in rows:
        pair = pairs[row["index"]]
        for name, ending in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            tokens = torch.tensor([pair.prompt + ending])
            with torch.no_grad():
                logps = theirs(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            summed = logps[len(pair.prompt) - 1 :].double().sum().item()
            assert row[f"{name}_logps"] == pytest.approx(summed, rel=1e-7, abs=1e-4)
            assert row[f"{name}_length"] == len(ending)


def test_every_pair_is_scored_identical_ones_too_and_in_file_order(world, tmp_path):
    data = tmp_path / "pairs.jsonl"
    same = {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " yes", "rejected": " yes"}
    longer = same | {"chosen": " yes and no and yes and no"}
    data.write_text("\n".join(map(json.dumps, [longer, same, longer, same])))
    rows = scores(tmp_path, "--model", str(world / "model"), "--data", str(data))
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["chosen_logps"] == pytest.approx(rows[1]["rejected_logps"], abs=1e-5)


def test_a_pair_too_long_for_max_length_is_left_out_and_counted_never_cut(world, tmp_path, capsys):
    data = world / "pairs.jsonl.gz"
    every = scores(tmp_path, "--model", str(world / "model"), "--data", str(data))
    some = scores(tmp_path, "--model", str(world / "model"), "--data", str(data), "--max-length", "45")
    assert 0 < len(some) < len(every) == 40
    assert "longer than max_length" in capsys.readouterr().out
    by_index = {row["index"]: row for row in every}
    for row in some:
        assert row["chosen_logps"] == pytest.approx(by_index[row["index"]]["chosen_logps"], rel=1e-5)


def test_micro_tokens_change_nothing_but_rounding(world, tmp_path):
    common = ["--model", str(world / "model"), "--reference", str(world / "other")]
    common += ["--data", str(world / "pairs.jsonl.gz")]
    for a, b in zip(
        scores(tmp_path, *common), scores(tmp_path, *common, "--micro-tokens", "80"), strict=True
    ):
        assert a == pytest.approx(b, rel=1e-5)
        assert a["reference_chosen_logps"] != a["chosen_logps"]


def test_what_cannot_work_is_refused_before_any_scoring(world, tmp_path):
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


def test_nothing_is_written_when_the_data_cannot_be_read(world, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: no key 'rejected'"):
        scores(tmp_path, "--model", str(world / "model"), "--data", str(data))
    assert not (tmp_path / "scores.jsonl").exists()
