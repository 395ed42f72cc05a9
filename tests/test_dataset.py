"""From files to the pairs of a run: no prompt is on both sides, records are named, margins go with their pairs."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import train_rm
from minidpo.dataset import load_pairs, prompt_keys, require_margins
from minidpo.errors import UserError
from minidpo.hf_config import read_config
from minidpo.reference import pairs_fingerprint
from minidpo.sections import DataSection, OptimSection
from minidpo.token_store import PairTokens
from minidpo.tokenizer import Tokenizer, TokenPair
from record_files import record, write

# Train and eval


def sides(tokenizer: Tokenizer, world: Path, seed: int = 0, **settings: object):
    section = DataSection(max_length=40, max_prompt_length=20, **settings)
    return load_pairs(section, OptimSection(), tokenizer, read_config(world / "model"), seed)


def test_no_prompt_is_both_trained_on_and_evaluated_on_and_the_seed_decides(tokenizer, world, tmp_path):
    file = write(tmp_path / "a.jsonl", *(record(f"cat {i % 12}") for i in range(30)))
    train, held_out = sides(tokenizer, world, train=[str(file)], eval_pairs=7)
    assert len(held_out) == 7 and len(train) == 23
    assert not {*prompt_keys(train)} & {*prompt_keys(held_out)}
    again = sides(tokenizer, world, train=[str(file)], eval_pairs=7)[1]
    other = sides(tokenizer, world, seed=1, train=[str(file)], eval_pairs=7)[1]
    assert held_out.index.tolist() == again.index.tolist() != other.index.tolist()


def test_prompts_that_are_in_both_given_files_are_reported(tokenizer, world, tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(9)))
    held_out = write(tmp_path / "b.jsonl", *(record(f"cat {i}") for i in range(7, 12)))
    sides(tokenizer, world, train=[str(train)], eval=[str(held_out)])
    assert "warning: 2 prompts are in both data.train and data.eval" in capsys.readouterr().out


# Records by name, and their margins


def test_records_are_named_with_their_file():
    pairs = [TokenPair([1], [2], [3], index, file=file) for file, index in ((0, 4), (1, 4), (0, 7))]
    rows = np.array([0, 1, 2])
    assert PairTokens.from_pairs(pairs, ("a", "b")).records(rows) == "records [4, 7] of a, records [4] of b"
    assert PairTokens.from_pairs(pairs).records(rows[1:]) == "records [4, 7]"


def test_margins_go_with_their_pairs_and_missing_ones_are_named():
    pairs = [TokenPair([1], [2], [3], index, margin) for index, margin in enumerate((0.5, None, 2.0))]
    tokens = PairTokens.from_pairs(pairs, ("a.jsonl",))
    assert tokens.select(np.array([2, 0])).margin.tolist() == [2.0, 0.5]
    with pytest.raises(UserError, match=r"1 of 3 pairs have no margin \(records \[1\] of a.jsonl\)"):
        require_margins(tokens)
    require_margins(tokens.select(np.array([2, 0])))
    assert PairTokens.from_pairs(pairs[1:2]).margin is None


def test_the_fingerprint_of_pairs_is_that_of_their_tokens_margins_and_order():
    def of(*pairs: TokenPair, rows: tuple[int, ...] = (0, 1)) -> str:
        return pairs_fingerprint(PairTokens.from_pairs(pairs).select(np.array(rows)))

    a, b = TokenPair([1], [2], [3], 0), TokenPair([4], [5, 6], [7], 1)
    different = [
        of(a, b),
        of(b, a),
        of(a, b._replace(chosen=[6, 5])),
        of(a, b._replace(chosen=[5], rejected=[6, 7])),
    ]
    different += [of(a, b._replace(margin=1.0)), of(a, b, rows=(1, 0, 1))]
    assert len(set(different)) == len(different)
    assert of(a, b) == of(b, a, rows=(1, 0)), "where in the flat array they lie is nothing to it"


def test_the_reward_model_adds_each_records_margin_to_the_common_one_when_asked(config, world, tmp_path):
    lines = gzip.open(world / "pairs.jsonl.gz", "rt").read().splitlines()
    scored = [json.loads(line) | {"score_chosen": i % 3, "score_rejected": 1} for i, line in enumerate(lines)]
    file = write(tmp_path / "scored.jsonl", *scored)

    def first_loss(name: str, *overrides: str) -> float:
        base = [*config(), f"--data.train={file}", "--loss.lm_weight=0", "--optim.max_steps=1"]
        train_rm.main([*base, f"--run.out={tmp_path / name}", *overrides])
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["eval/loss"]

    plain, asked = first_loss("plain"), first_loss("asked", "--loss.margin_from_data=true")
    assert asked != pytest.approx(plain, rel=1e-3)
    one_by_one = first_loss("one", "--loss.margin_from_data=true", "--optim.micro_tokens=100")
    assert one_by_one == pytest.approx(asked, rel=1e-5), "each pair has its own margin, whatever its row"
    same = [row | {"margin": 0.75} for row in scored]
    write(file, *same)
    both = first_loss("both", "--loss.margin_from_data=true", "--loss.margin=0.5")
    assert both == pytest.approx(first_loss("constant", "--loss.margin=1.25"), rel=1e-6)
    with pytest.raises(UserError, match="loss.margin_from_data: 32 of 32 pairs have no margin"):
        train_rm.main([*config(), "--loss.margin_from_data=true"])
