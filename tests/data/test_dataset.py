"""From files to training and held-out pairs: no prompt is in both, and its record decides where it is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_model import DATED, NO, YES, chat_model, turn

from minidpo.data import Tokenizer, load_pairs, require_fit, split_by_prompt
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import record, write

PROMPTS = [f"question {i % 70}".encode() for i in range(100)]  # 30 prompts have two pairs.


def test_split():
    """No prompt is on both sides of a split, which depends on the seed and not on the file's order. One that
    leaves a side empty is refused."""
    held_out = split_by_prompt(PROMPTS, 25, seed=1)
    inside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if out}
    outside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if not out}
    assert sum(held_out) == 25 and not inside & outside
    assert (split_by_prompt(PROMPTS[::-1], 25, seed=1) == held_out[::-1]).all()
    assert (split_by_prompt(PROMPTS, 25, seed=2) != held_out).any()
    assert not split_by_prompt(PROMPTS, 0, seed=1).any()
    with pytest.raises(UserError, match="100 of 100 records, held .*, leave none to train on; choose fewer"):
        split_by_prompt(PROMPTS, 100, seed=1)
    with pytest.raises(UserError, match="5 of 10 records, held .*, leave none to hold out; choose more"):
        split_by_prompt([b"same"] * 10, 5, seed=1)


def load(tokenizer: Tokenizer, *files: Path, **settings: object):
    limits = {"max_length": 120, "max_prompt_length": 100}
    return load_pairs(DataSection(train=[str(file) for file in files], **limits | settings), tokenizer, 0)


def test_both_files(tokenizer, tmp_path, capsys):
    """Prompts that are in both given files are reported."""
    train = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(9)))
    held_out = write(tmp_path / "b.jsonl", *(record(f"cat {i}") for i in range(7, 12)))
    load(tokenizer, train, eval=[str(held_out)])
    assert "warning: 2 prompts are in both data.train and data.eval" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"date": "2025-01-01"}, {"template": "chatml"}, {"max_prompt_length": 3}])
def test_held_out_by_record(tokenizer, tmp_path, change):
    """Date, template, limits, tokenizer and shape change a record's ids, not the side on which it is."""
    prompts = [[turn("user", f"Is it {'very ' * 9}{i % 20}?")] for i in range(30)]
    messages = [{"prompt": prompt, "chosen": [YES], "rejected": [NO]} for prompt in prompts]
    conversations = [{"chosen": [*prompt, YES], "rejected": [*prompt, NO]} for prompt in prompts]
    first = write(tmp_path / "messages.jsonl", *messages)
    second = write(tmp_path / "conversations.jsonl", *conversations)
    _, expected = load(tokenizer, first, eval_pairs=8, template="hh")
    _, held_out = load(chat_model(tmp_path, DATED), second, eval_pairs=8, **change)
    assert held_out.index.tolist() == expected.index.tolist()


def test_dropped_records(tmp_path):
    """Limits and templates that drop records leave every other record on its side."""
    no_system = DATED.replace("<{{", "{{ raise_exception('no') if m.role == 'system' }}<{{", 1)
    records = []
    for i in range(40):
        # Of every other record, the responses differ only at their ends.
        words = "and " * (60 if i % 2 else 1)
        prompt = [turn("system", "Brief.")] * (i % 3 == 0) + [turn("user", f"{i}?")]
        responses = {"chosen": [turn("assistant", words + "yes")], "rejected": [turn("assistant", words)]}
        records.append({"prompt": prompt} | responses)
    records[7] |= {"rejected": records[7]["chosen"]}
    records[8] |= {"rejected": [turn("assistant", " ")]}
    file = write(tmp_path / "a.jsonl", *records)
    sides = []
    # The third call reads the token ids of the second from the cache.
    for template, limit in ((DATED, 500), (DATED, 80), (DATED, 80), (no_system, 500)):
        settings = {"eval_pairs": 12, "max_length": limit, "max_prompt_length": 60, "skip_bad": True}
        sets = load(chat_model(tmp_path, template), file, **settings, cache=str(tmp_path / "tokens"))
        sides.append([{*pairs.index.tolist()} for pairs in sets])
    (all_train, all_held_out), *others = sides
    assert len(all_train | all_held_out) == 38 and 10 <= len(all_held_out) <= 12
    for train, held_out in others:
        assert len(train | held_out) < 30 and train <= all_train and held_out <= all_held_out


SEVERAL = [
    {"instruction": f"{i}?", "completions": [{"response": f" {r}", "overall_score": r % 4} for r in range(5)]}
    for i in range(30)
]  # Of the scores 0, 1, 2, 3, 0 nine pairs differ.


def test_several_pairs(tokenizer, tmp_path):
    """Records with several pairs are held out by prompt, the same whether one pair is read of each or all."""
    tied = {"instruction": "?", "completions": SEVERAL[0]["completions"][::4]}
    file = write(tmp_path / "a.jsonl", tied, *SEVERAL)
    best, of_best = load(tokenizer, file, eval_pairs=5)
    train, held_out = load(tokenizer, file, eval_pairs=5, pairs_per_prompt="all")
    assert len(of_best) == 5 and set(held_out.index) == set(of_best.index) and len(held_out) == 5 * 9
    assert set(train.index) == set(best.index) == set(range(1, 31)) - set(held_out.index)
    # Each pair has the key of its own record.
    for pairs in (train, held_out):
        both = {(i, key.tobytes()) for i, key in zip(pairs.index, pairs.key, strict=True)}
        assert len(both) == len({key for _, key in both}) == len(set(pairs.index))
    with pytest.raises(UserError, match="data.eval_pairs = 30 of 30 records, .* to train on"):
        load(tokenizer, write(tmp_path / "a.jsonl", *SEVERAL), eval_pairs=30, pairs_per_prompt="all")


def test_limit(tokenizer, tmp_path):
    """data.limit counts records over all files."""
    first = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(4)))
    second = write(tmp_path / "b.jsonl", *(record(f"dog {i}") for i in range(2)))
    for limit, indices in ((0, [0, 1, 2, 3, 0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 0])):
        assert load(tokenizer, first, second, eval_pairs=0, limit=limit)[0].index.tolist() == indices


def test_limit_holds_out(tokenizer, tmp_path):
    """A run with data.limit holds out each record it reads that a run over all records holds out."""
    file = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(60)))
    _, of_all = load(tokenizer, file, eval_pairs=12)
    train, held_out = load(tokenizer, file, eval_pairs=12, limit=40)
    assert {i for i in of_all.index if i < 40} <= set(held_out.index) and len(train) == 28


def test_min_margin(tokenizer, tmp_path, capsys):
    """data.min_margin drops and counts pairs with a smaller margin, and those without one."""
    margins = [{"margin": 0.5}, {"margin": 2}, {}, {"score_chosen": 3, "score_rejected": 1}, {"margin": 1}]
    file = write(tmp_path / "a.jsonl", *(record(f"cat {i}") | more for i, more in enumerate(margins)))
    assert load(tokenizer, file, eval_pairs=0, min_margin=1.0)[0].index.tolist() == [1, 3, 4]
    said = capsys.readouterr().out
    assert "dropped 1: a margin below 1.0 (data.min_margin) (line 1)" in said
    assert "dropped 1: no margin (data.min_margin) (line 3)" in said
    assert len(load(tokenizer, file, eval_pairs=0)[0]) == 5


def test_fit(tokenizer):
    """A model that takes fewer tokens, or has fewer ids, is refused, and the error names its role."""
    model = SimpleNamespace(max_length=64, vocab_size=tokenizer.vocab_size)
    require_fit("model", model, tokenizer, 64)
    with pytest.raises(UserError, match=r"texts of up to 65 tokens \(max_length\), but the policy takes 64"):
        require_fit("policy", model, tokenizer, 65)
    model.vocab_size -= 1
    with pytest.raises(UserError, match="the reference's embedding 299 rows"):
        require_fit("reference", model, tokenizer, 64)
