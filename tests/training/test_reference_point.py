"""KTO's data: pairs as labelled responses, and responses to other prompts. Its gradients: test_applied_gradients.py."""

from dataclasses import replace

import numpy as np

from minidpo.data import PairTokens, TokenPair
from runs import run_dpo, steps

PAIRS = PairTokens.from_pairs(
    [TokenPair([1, 10], [11, 2], [12, 13, 2], 5), TokenPair([1], [21, 22, 23, 2], [2], 7, margin=1.5)]
)


def texts(pairs: PairTokens) -> list[list[list[int]]]:
    """The prompt and the responses of each row."""
    return [
        [pairs.ids[a:b].tolist() for a, b in zip(row, row[1:], strict=False)] for row in pairs.bounds.tolist()
    ]


def test_unpaired():
    """Two pairs become four records: first the chosen responses, desirable, and then the rejected ones."""
    single = PAIRS.unpaired()
    assert texts(single) == [[[1, 10], [11, 2]], [[1], [21, 22, 23, 2]], [[1, 10], [12, 13, 2]], [[1], [2]]]
    assert single.label.tolist() == [True, True, False, False] and single.index.tolist() == [5, 7, 5, 7]
    assert replace(single, label=~single.label).fingerprint() != single.fingerprint()
    assert texts(single.select(np.array([3, 0]))) == [[[1], [2]], [[1, 10], [11, 2]]]


def test_mismatched():
    """In each batch a prompt gets the response of the row before it (the first prompt that of the last
    row). A text that becomes longer than max_length is cut."""
    single = PAIRS.unpaired()
    other = single.mismatched([np.array([0, 1]), np.array([3, 2, 0]), np.array([1])], max_length=4)
    of_first, of_third = [[[1, 10], [21, 22]], [[1], [11, 2]]], [[1], [21, 22, 23]]
    assert texts(other) == [*of_first, [[1], [11, 2]], [[1, 10], [2]], [[1, 10], [12, 13]], of_third]


def test_log(config):
    """Desirable responses and the others have means of their own; a batch that lacks the one or the other logs no
    mean over them, and no NaN."""
    lines = steps(run_dpo(config(optim__batch_size=2, optim__max_steps=6), "--loss.name=kto"))
    assert lines[0]["loss"] == 0.5 and lines[0]["accuracy"] == lines[0]["z0"] == 0
    named = [{"rewards/chosen", "rewards/rejected", "rewards/margins"} & line.keys() for line in lines]
    assert {len(names) for names in named} == {1, 2} and "rewards/margins" not in set.union(*named)


def test_one_left(five_pairs, world):
    """A last batch of one record, here the last of ten, has no response to another prompt: its z0 is 0."""
    keys = "--loss.name=kto --optim.batch_size=3 --optim.epochs=1 --optim.max_steps=0".split()
    models = [f"--model.path={world / 'other'}", f"--reference.path={world / 'model'}"]
    *before, last = steps(run_dpo(five_pairs, *keys, *models))
    assert len(before) == 3 and before[-1]["z0"] > 0 == last["z0"]
