"""The flat arrays of token ids: every column goes with its pair, and says what the pair said."""

import numpy as np
import pytest

from minidpo.data import PairTokens, TokenPair, require_margins
from minidpo.errors import UserError


def test_responses():
    """A prompt has K responses, one after the other; a selection takes every column along."""
    prompts, responses = [[1, 2], [3]], [[[4], [5, 6], [7]], [[8, 9], [4], [5]]]
    pairs = PairTokens.from_responses(prompts, responses)
    assert pairs.ids.tolist() == [1, 2, 4, 5, 6, 7, 3, 8, 9, 4, 5]
    assert pairs.bounds.tolist() == [[0, 2, 3, 5, 6], [6, 7, 9, 10, 11]]
    assert pairs.lengths.tolist() == [[2, 1, 2, 1], [1, 2, 1, 1]]
    assert pairs.token_counts().tolist() == [6, 5]  # 2 + 1 + 2 + 1 and 1 + 2 + 1 + 1
    assert pairs.token_counts(1).tolist() == [3, 3]  # the prompt and its first response: 2 + 1 and 1 + 2
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
    assert tokens.select(np.array([2, 0])).margin.tolist() == [2.0, 0.5]
    with pytest.raises(UserError, match=r"1 of 3 pairs have no margin \(records \[1\] of a.jsonl\)"):
        require_margins(tokens)
    require_margins(tokens.select(np.array([2, 0])))
    assert PairTokens.from_pairs(pairs[1:2]).margin is None


def test_fingerprint():
    """The fingerprint is that of tokens, lengths, margins and order, not of where they lie in the array."""
    a, b = TokenPair([1], [2], [3], 0), TokenPair([4], [5, 6], [7], 1)
    expected = PairTokens.from_pairs([a, b]).fingerprint()
    changes = {"chosen": [6, 5]}, {"chosen": [5], "rejected": [6, 7]}, {"margin": 1.0}
    for other in (*changes, {"unscored": (((0, 1),), ())}):
        assert PairTokens.from_pairs([a, b._replace(**other)]).fingerprint() != expected
    assert PairTokens.from_pairs([b, a]).fingerprint() != expected
    assert PairTokens.from_pairs([b, a]).select(np.array([1, 0])).fingerprint() == expected
    labelled = (TokenPair([1], [2], None, 0, label=label) for label in (True, False))
    assert len({PairTokens.from_pairs([pair]).fingerprint() for pair in labelled}) == 2


def test_one_response():
    """Records of one response have K = 1, and a label each or none; a set keeps to one kind."""
    two, one = TokenPair([1], [2], [3], 0), TokenPair([4, 5], [6, 7, 8], None, 5, file=1)
    good, bad = (one._replace(label=label, index=6) for label in (True, False))
    pairs = PairTokens.from_pairs([one, one])
    assert pairs.bounds.tolist() == [[0, 2, 5], [5, 7, 10]] and pairs.responses == 1 and pairs.label is None
    labels = PairTokens.from_pairs([good, bad]).select(np.array([1, 0])).label
    assert labels.dtype == bool and labels.tolist() == [False, True]
    for mixed, said in (
        ([two, one], "record 5 of b has one response, and those before it two responses; a data set"),
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
    assert pairs.scored_lengths.tolist() == [[1, 1], [2, 1]]
    assert pairs.select(np.array([1])).scored_lengths.tolist() == [[2, 1]]
    assert PairTokens.from_pairs([TokenPair([1], [2], [3], 1)]).unscored is None
