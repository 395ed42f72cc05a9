"""KTO's data: pairs as labelled responses, and responses to other prompts. Its gradients: test_applied_gradients.py."""

from dataclasses import replace

import numpy as np
import pytest

from minidpo.data import PairTokens, TokenPair
from minidpo.errors import UserError
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


def test_log(config, world, tmp_path):
    """The means of rewards are over desirable responses and over the others; held-out records have a z0 too."""
    first, *_ = steps(run_dpo(config(optim__batch_size=6), "--loss.name=kto"))
    assert first["loss"] == 0.5 and first["accuracy"] == first["z0"] == 0
    assert {"rewards/chosen", "rewards/rejected"} <= first.keys() and "rewards/margins" not in first
    models = [f"--model.path={world / 'other'}", f"--reference.path={world / 'model'}"]
    assert run_dpo(config(), "--loss.name=kto", *models, f"--run.out={tmp_path / 'o'}")[0]["eval/z0"] > 1


def test_one_label(config):
    """A batch without an undesirable response logs no mean over them, and no NaN."""
    lines = run_dpo(config(optim__batch_size=2, optim__max_steps=6), "--loss.name=kto")
    named = {frozenset({"rewards/chosen", "rewards/rejected"} & line.keys()) for line in steps(lines)}
    assert {len(names) for names in named} == {1, 2}


def test_one_response(config):
    """A batch of one has no response to another prompt."""
    with pytest.raises(UserError, match="optim.batch_size = 1, but kto compares with the other responses"):
        run_dpo(config(), "--loss.name=kto", "--optim.batch_size=1")
