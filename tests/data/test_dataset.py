"""From files to the pairs of a run: no prompt is on both sides, and its record decides on which one it is."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from chat_model import DATED, NO, YES, chat_model, turn

from minidpo.data import (
    PairTokens,
    Tokenizer,
    TokenPair,
    load_pairs,
    longest_pair,
    require_fit,
    require_margins,
    split_by_prompt,
)
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import record, write

PROMPTS = [f"question {i % 70}".encode() for i in range(100)]  # 30 prompts have two pairs.


def test_split():
    """No prompt is on both sides of a split, which depends on the seed and not on the file's order."""
    held_out = split_by_prompt(PROMPTS, 25, seed=1)
    inside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if out}
    outside = {prompt for prompt, out in zip(PROMPTS, held_out, strict=True) if not out}
    assert sum(held_out) == 25 and not inside & outside
    assert (split_by_prompt(PROMPTS[::-1], 25, seed=1) == held_out[::-1]).all()
    assert (split_by_prompt(PROMPTS, 25, seed=2) != held_out).any()
    assert not split_by_prompt(PROMPTS, 0, seed=1).any()


@pytest.mark.parametrize(
    ("prompts", "count", "said"),
    [
        (PROMPTS, -1, "-1 pairs to hold out of 100"),
        (PROMPTS, 100, "100 pairs to hold out of 100"),
        ([b"same"] * 10, 5, "none can be held out"),
    ],
)
def test_empty_side(prompts, count, said):
    """A split that leaves a side empty is refused."""
    with pytest.raises(UserError, match=said):
        split_by_prompt(prompts, count, seed=1)


def load(tokenizer: Tokenizer, *files: Path, seed: int = 0, **settings: object):
    limits = {"max_length": 120, "max_prompt_length": 100}
    return load_pairs(DataSection(train=[str(file) for file in files], **limits | settings), tokenizer, seed)


def test_two_sides(tokenizer, tmp_path):
    """Pairs are trained on or held out, and the seed decides which."""
    file = write(tmp_path / "a.jsonl", *(record(f"cat {i % 12}") for i in range(30)))
    train, held_out = load(tokenizer, file, eval_pairs=7)
    assert len(held_out) == 7 and not {*train.prompt_keys()} & {*held_out.prompt_keys()}
    assert sorted([*train.index, *held_out.index]) == list(range(30))
    assert load(tokenizer, file, eval_pairs=7, seed=1)[1].index.tolist() != held_out.index.tolist()


def test_both_files(tokenizer, tmp_path, capsys):
    """Prompts that are in both given files are reported."""
    train = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(9)))
    held_out = write(tmp_path / "b.jsonl", *(record(f"cat {i}") for i in range(7, 12)))
    load(tokenizer, train, eval=[str(held_out)])
    assert "warning: 2 prompts are in both data.train and data.eval" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"date": "2025-01-01"}, {"template": "chatml"}, {"max_prompt_length": 3}])
def test_held_out_by_record(tokenizer, tmp_path, change):
    """Date, template, limits, tokenizer and shape change a record's ids, not the side on which it is."""
    pytest.importorskip("jinja2")
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
    pytest.importorskip("jinja2")
    no_system = DATED.replace(
        "<{{", "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{", 1
    )
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
    # The second time, the short ones are mapped from the cache.
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
    """Records with several pairs are held out by prompt, the same whether one of their pairs is read or all."""
    file = write(
        tmp_path / "a.jsonl", {"instruction": "?", "completions": SEVERAL[0]["completions"][::4]}, *SEVERAL
    )
    best, of_best = load(tokenizer, file, eval_pairs=5)
    train, held_out = load(tokenizer, file, eval_pairs=5, pairs_per_prompt="all")
    assert len(of_best) == 5 and set(held_out.index) == set(of_best.index) and len(held_out) == 5 * 9
    assert set(train.index) == set(best.index) == set(range(1, 31)) - set(held_out.index)
    # Each pair has the key of its own record.
    for pairs in (train, held_out):
        keys = dict(zip(pairs.index, pairs.prompt_keys(), strict=True))
        assert [keys[i] for i in pairs.index] == pairs.prompt_keys() and len(set(keys.values())) == len(keys)
    with pytest.raises(UserError, match="data.eval_pairs = 30 holds out every record"):
        load(tokenizer, write(tmp_path / "a.jsonl", *SEVERAL), eval_pairs=30, pairs_per_prompt="all")


@pytest.mark.parametrize(
    ("limit", "indices", "said"),
    [
        (0, [0, 1, 2, 3, 0, 1], None),
        (3, [0, 1, 2], "data.limit: the first 3 records; {b} not read"),
        (5, [0, 1, 2, 3, 0], "data.limit: the first 5 records\n"),
    ],
)
def test_limit(tokenizer, tmp_path, capsys, limit, indices, said):
    """data.limit counts records over all files, and files that are not reached are named."""
    first = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(4)))
    second = write(tmp_path / "b.jsonl", *(record(f"dog {i}") for i in range(2)))
    assert load(tokenizer, first, second, eval_pairs=0, limit=limit)[0].index.tolist() == indices
    out = capsys.readouterr().out
    assert said.format(b=second) in out if said else "data.limit" not in out


def test_limit_holds_out(tokenizer, tmp_path):
    """What all records hold out, a limited run holds out, too, as far as it reads it."""
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


def test_nothing_survives():
    """Held-out records that were all dropped are an error, as is a prompt with too many pairs."""
    records = [str(i).encode() for i in range(9)]
    (chosen,) = np.flatnonzero(split_by_prompt(records, 1, seed=0))
    left = records[:chosen] + records[chosen + 1 :]
    with pytest.raises(UserError, match="all records chosen were dropped, so none can be held out"):
        split_by_prompt(left, 1, 0, records)


def test_keys_of_pairs(tokenizer, tmp_path):
    """Each pair that is kept has the key of its own record, whatever was dropped before it."""
    alike = record("dog", rejected=" yes")
    cut = record("fox", chosen="x" * 200 + "a", rejected="x" * 200 + "b")
    file = write(tmp_path / "a.jsonl", alike, cut, record("cat 0"), cut, record("cat 1"), alike)
    train, _ = load(tokenizer, file, file, eval_pairs=0)
    (tmp_path / "b").mkdir()
    plain = write(tmp_path / "b" / "a.jsonl", record("cat 0"), record("cat 1"))
    assert train.prompt_keys() == load(tokenizer, plain, eval_pairs=0)[0].prompt_keys() * 2


def test_fit(tokenizer):
    """A model that takes fewer tokens, or has fewer ids, is refused by its role."""
    model = SimpleNamespace(max_length=64, vocab_size=tokenizer.vocab_size)
    require_fit("model", model, tokenizer, 64)
    with pytest.raises(UserError, match=r"texts of up to 65 tokens \(max_length\), but the policy takes 64"):
        require_fit("policy", model, tokenizer, 65)
    model.vocab_size -= 1
    with pytest.raises(UserError, match="the reference's embedding 299 rows"):
        require_fit("reference", model, tokenizer, 64)


# The arrays of the pairs


def test_responses():
    """A prompt has K responses, one after the other; a selection takes every column along."""
    prompts, responses = [[1, 2], [3]], [[[4], [5, 6], [7]], [[8, 9], [4], [5]]]
    pairs = PairTokens.from_responses(prompts, responses)
    assert pairs.ids.tolist() == [1, 2, 4, 5, 6, 7, 3, 8, 9, 4, 5]
    assert pairs.bounds.tolist() == [[0, 2, 3, 5, 6], [6, 7, 9, 10, 11]]
    assert pairs.lengths.tolist() == [[2, 1, 2, 1], [1, 2, 1, 1]]
    assert pairs.token_counts().tolist() == [6, 5]  # 2 + 1 + 2 + 1 and 1 + 2 + 1 + 1
    assert pairs.token_counts(1).tolist() == [3, 3]  # the prompt and its first response: 2 + 1 and 1 + 2
    assert longest_pair(pairs.select(np.array([1])), pairs) == 6
    pairs.ref_logps = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    second = pairs.select(np.array([1]))
    assert second.ref_logps.tolist() == [[3, 4]] and second.token_counts(2).tolist() == [4]
    assert len(PairTokens.from_responses([], [])) == len(PairTokens.from_pairs([])) == 0
    with pytest.raises(ValueError, match="the first prompt has 3 responses"):
        PairTokens.from_responses(prompts, [responses[0], responses[1][:2]])


def test_records():
    """Pairs are named by their records, with the file if there are files."""
    pairs = [TokenPair([1], [2], [3], index, file=file) for file, index in ((0, 4), (1, 4), (0, 7))]
    rows = np.array([0, 1, 2])
    assert PairTokens.from_pairs(pairs, ("a", "b")).records(rows) == "records [4, 7] of a, records [4] of b"
    assert PairTokens.from_pairs(pairs).records(rows[1:]) == "records [4, 7]"


def test_margins():
    """Margins go with their pairs, and missing ones are named."""
    pairs = [TokenPair([1], [2], [3], index, margin) for index, margin in enumerate((0.5, None, 2.0))]
    tokens = PairTokens.from_pairs(pairs, ("a.jsonl",))
    assert tokens.margins(np.array([2, 0])).tolist() == [2.0, 0.5]
    with pytest.raises(UserError, match=r"1 of 3 pairs have no margin \(records \[1\] of a.jsonl\)"):
        require_margins(tokens)
    require_margins(tokens.select(np.array([2, 0])))
    assert PairTokens.from_pairs(pairs[1:2]).margins(np.array([0])) is None


def test_fingerprint():
    """The fingerprint is that of tokens, lengths, margins and order, not of where they lie in the array."""
    a, b = TokenPair([1], [2], [3], 0), TokenPair([4], [5, 6], [7], 1)
    expected = PairTokens.from_pairs([a, b]).fingerprint()
    for other in ({"chosen": [6, 5]}, {"chosen": [5], "rejected": [6, 7]}, {"margin": 1.0}):
        assert PairTokens.from_pairs([a, b._replace(**other)]).fingerprint() != expected
    assert PairTokens.from_pairs([b, a]).fingerprint() != expected
    assert PairTokens.from_pairs([b, a]).select(np.array([1, 0])).fingerprint() == expected
    labelled = [TokenPair([1], [2], None, 0, label=label) for label in (True, False)]
    marked = [a, b._replace(unscored=(((0, 1),), ()))]
    assert PairTokens.from_pairs(marked).fingerprint() != expected
    one, two = (PairTokens.from_pairs([pair]).fingerprint() for pair in labelled)
    assert one != two


def test_one_response():
    """Records of one response have K = 1, and a label each or none; a set keeps to one kind."""
    two, one = TokenPair([1], [2], [3], 0), TokenPair([4, 5], [6, 7, 8], None, 5, file=1)
    good, bad = (one._replace(label=label, index=6) for label in (True, False))
    pairs = PairTokens.from_pairs([one, one])
    assert pairs.bounds.tolist() == [[0, 2, 5], [5, 7, 10]] and pairs.responses == 1 and pairs.label is None
    labels = PairTokens.from_pairs([good, bad]).select(np.array([1, 0])).label
    assert labels.dtype == bool and labels.tolist() == [False, True]
    for mixed, said in (
        (
            [two, one],
            "record 5 of b has one response, and those before it two responses; a data set keeps to",
        ),
        ([one, good], "record 6 of b has one response with a label, and those before it one response"),
        ([bad, one], "record 5 of b has one response, and those before it one response with a label"),
    ):
        with pytest.raises(UserError, match=said):
            PairTokens.from_pairs(mixed, ("a", "b"))


def test_unscored():
    """Tokens that others wrote are marked in the array of ids, and not counted among those scored."""
    turns = TokenPair([1, 2], [3, 4, 5, 6], [7, 8, 9], 0, unscored=(((1, 2), (2, 3)), ((0, 2),)))
    pairs = PairTokens.from_pairs([TokenPair([1], [2], [3], 1), turns])
    #                                         1  2  3  1  2  3  4  5  6  7  8  9
    assert pairs.unscored.astype(int).tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 0]
    assert pairs.scored_lengths.tolist() == [[1, 1], [2, 1]] and pairs.lengths.tolist() == [
        [1, 1, 1],
        [2, 4, 3],
    ]
    assert pairs.select(np.array([1])).scored_lengths.tolist() == [[2, 1]]
    assert PairTokens.from_pairs([TokenPair([1], [2], [3], 1)]).unscored is None
