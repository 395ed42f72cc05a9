"""From files to the pairs of a run: no prompt is on both sides, records are named, margins are kept."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train_rm
from minidpo.data import PairTokens, Tokenizer, TokenPair, load_pairs, longest_pair, require_fit
from minidpo.data.dataset import require_margins, split_by_prompt
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import record, write

PROMPTS = [f"question {i % 70}".encode() for i in range(100)]  # 30 prompts have two pairs


def sides(tokenizer: Tokenizer, seed: int = 0, **settings: object) -> tuple[PairTokens, PairTokens]:
    return load_pairs(DataSection(max_length=40, max_prompt_length=20, **settings), tokenizer, seed)


# Train and eval


def test_split_by_prompt():
    """No prompt is on both sides of the split, which depends on the seed and not on the file's order."""
    mask = split_by_prompt(PROMPTS, 25, seed=1)
    inside = {prompt for prompt, out in zip(PROMPTS, mask, strict=True) if out}
    outside = {prompt for prompt, out in zip(PROMPTS, mask, strict=True) if not out}
    assert sum(mask) == 25 and not inside & outside
    assert (split_by_prompt(PROMPTS[::-1], 25, seed=1) == mask[::-1]).all()
    assert (split_by_prompt(PROMPTS, 25, seed=2) != mask).any()


def test_empty_side():
    """A split that leaves a side empty is refused; holding nothing out is not."""
    assert not split_by_prompt(PROMPTS, 0, seed=1).any()
    for impossible in (-1, 100, 101):
        with pytest.raises(UserError, match=f"{impossible} pairs to hold out of 100"):
            split_by_prompt(PROMPTS, impossible, seed=1)
    with pytest.raises(UserError, match="none can be held out"):
        split_by_prompt([b"same"] * 10, 5, seed=1)


def test_two_sides(tokenizer, tmp_path):
    """No prompt is both trained on and evaluated on, and the seed decides which is held out."""
    file = write(tmp_path / "a.jsonl", *(record(f"cat {i % 12}") for i in range(30)))
    train, held_out = sides(tokenizer, train=[str(file)], eval_pairs=7)
    assert len(held_out) == 7 and len(train) == 23
    assert not {*train.prompt_keys()} & {*held_out.prompt_keys()}
    again = sides(tokenizer, train=[str(file)], eval_pairs=7)[1]
    other = sides(tokenizer, seed=1, train=[str(file)], eval_pairs=7)[1]
    assert held_out.index.tolist() == again.index.tolist() != other.index.tolist()
    train, held_out = sides(tokenizer, train=[str(file)], eval_pairs=0)
    assert (len(train), len(held_out), longest_pair(held_out)) == (30, 0, 0)


def test_prompts_of_both_files(tokenizer, tmp_path, capsys):
    """Prompts that are in both given files are reported."""
    train = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(9)))
    held_out = write(tmp_path / "b.jsonl", *(record(f"cat {i}") for i in range(7, 12)))
    sides(tokenizer, train=[str(train)], eval=[str(held_out)])
    assert "warning: 2 prompts are in both data.train and data.eval" in capsys.readouterr().out


def test_model_that_does_not_fit(tokenizer):
    """A model that takes fewer tokens, or has fewer ids, is refused by its role."""
    model = SimpleNamespace(max_length=64, vocab_size=tokenizer.vocab_size)
    require_fit("model", model, tokenizer, 64)
    with pytest.raises(UserError, match=r"texts of up to 65 tokens \(max_length\), but the policy takes 64"):
        require_fit("policy", model, tokenizer, 65)
    model.vocab_size -= 1
    with pytest.raises(UserError, match="the reference's embedding 299 rows"):
        require_fit("reference", model, tokenizer, 64)


# The arrays of the pairs


def test_names_of_records():
    """Records are named with their file, if there are files."""
    pairs = [TokenPair([1], [2], [3], index, file=file) for file, index in ((0, 4), (1, 4), (0, 7))]
    rows = np.array([0, 1, 2])
    assert PairTokens.from_pairs(pairs, ("a", "b")).records(rows) == "records [4, 7] of a, records [4] of b"
    assert PairTokens.from_pairs(pairs).records(rows[1:]) == "records [4, 7]"


def test_margins():
    """Margins go with their pairs, and missing ones are named."""
    pairs = [TokenPair([1], [2], [3], index, margin) for index, margin in enumerate((0.5, None, 2.0))]
    tokens = PairTokens.from_pairs(pairs, ("a.jsonl",))
    assert tokens.select(np.array([2, 0])).margin.tolist() == [2.0, 0.5]
    assert tokens.margins(np.array([2, 0])).tolist() == [2.0, 0.5]
    with pytest.raises(UserError, match=r"1 of 3 pairs have no margin \(records \[1\] of a.jsonl\)"):
        require_margins(tokens)
    require_margins(tokens.select(np.array([2, 0])))
    without = PairTokens.from_pairs(pairs[1:2])
    assert without.margin is None and without.margins(np.array([0])) is None


def test_any_number_of_responses():
    """A prompt has K responses: tokens counts the first of them, and select takes every column along."""
    prompts, responses = [[1, 2], [3]], [[[4], [5, 6], [7]], [[8, 9], [4], [5]]]
    pairs = PairTokens.from_responses(prompts, responses)
    assert pairs.ids.tolist() == [1, 2, 4, 5, 6, 7, 3, 8, 9, 4, 5]
    assert pairs.bounds.tolist() == [[0, 2, 3, 5, 6], [6, 7, 9, 10, 11]]
    assert pairs.lengths.tolist() == [[2, 1, 2, 1], [1, 2, 1, 1]]
    assert pairs.tokens().tolist() == [6, 5] and pairs.tokens(1).tolist() == [3, 3]
    assert longest_pair(pairs, pairs.select(np.array([1]))) == 6
    pairs.ref_logps = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    second = pairs.select(np.array([1]))
    assert second.ref_logps.tolist() == [[3, 4]] and second.tokens(2).tolist() == [4]
    as_pairs = PairTokens.from_pairs([TokenPair([1, 2], [4], [5, 6], 0)])
    assert as_pairs.fingerprint() == PairTokens.from_responses([[1, 2]], [[[4], [5, 6]]]).fingerprint()
    assert len(PairTokens.from_responses([], [])) == len(PairTokens.from_pairs([])) == 0
    with pytest.raises(ValueError, match="the first prompt has 3 responses"):
        PairTokens.from_responses(prompts, [responses[0], responses[1][:2]])


def test_fingerprint():
    """The fingerprint is that of tokens, margins and order, not of where they lie in the array."""

    def of(*pairs: TokenPair, rows: tuple[int, ...] = (0, 1)) -> str:
        return PairTokens.from_pairs(pairs).select(np.array(rows)).fingerprint()

    a, b = TokenPair([1], [2], [3], 0), TokenPair([4], [5, 6], [7], 1)
    moved, cut = b._replace(chosen=[5], rejected=[6, 7]), b._replace(chosen=[6, 5])
    different = {
        of(a, b),
        of(b, a),
        of(a, cut),
        of(a, moved),
        of(a, b._replace(margin=1.0)),
        of(a, b, rows=(1, 0, 1)),
    }
    assert len(different) == 6
    assert of(a, b) == of(b, a, rows=(1, 0))


def test_margins_of_a_run(config, world, tmp_path):
    """A reward model adds each record's margin to the common one, when asked."""
    lines = gzip.open(world / "pairs.jsonl.gz", "rt").read().splitlines()
    scored = [json.loads(line) | {"score_chosen": i % 3, "score_rejected": 1} for i, line in enumerate(lines)]
    file = write(tmp_path / "scored.jsonl", *scored)

    def first_loss(name: str, *overrides: str) -> float:
        base = [*config(), f"--data.train={file}", "--loss.lm_weight=0", "--optim.max_steps=1"]
        train_rm.main([*base, f"--run.out={tmp_path / name}", *overrides])
        return json.loads(Path(tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["eval/loss"]

    plain, asked = first_loss("plain"), first_loss("asked", "--loss.margin_from_data=true")
    assert asked != pytest.approx(plain, rel=1e-3)
    one_by_one = first_loss("one", "--loss.margin_from_data=true", "--optim.micro_tokens=100")
    assert one_by_one == pytest.approx(asked, rel=1e-5), "each pair has its own margin, whatever its row"
    write(file, *(row | {"margin": 0.75} for row in scored))
    both = first_loss("both", "--loss.margin_from_data=true", "--loss.margin=0.5")
    assert both == pytest.approx(first_loss("constant", "--loss.margin=1.25"), rel=1e-6)
    with pytest.raises(UserError, match="loss.margin_from_data: 32 of 32 pairs have no margin"):
        train_rm.main([*config(), "--loss.margin_from_data=true"])
