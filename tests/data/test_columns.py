"""Records with several answers, columns with other names, and what a single record among others may lack."""

import pytest
from chat_model import chat_model
from test_shapes import ASK, BRIEF, OF_TWO, TEXTS, A, B, Q, answers, one, pair, read

from minidpo.errors import UserError

# Several pairs of one record

RANKS, SCORES = answers("answer", "rank", 2, 1, 2), answers("response", "overall_score", 1, 3, 2)


@pytest.mark.parametrize(
    ("record", "every", "ties"),
    [
        # Of ranks 2, 1, 2 the second answer beats both others, which tie.
        ({"prompt": ASK, "answers": RANKS}, [("No.", "Yes."), ("No.", "Hm.")], 1),
        ({"prompt": ASK, "answers": RANKS[::2]}, [], 1),
        # 3 * 2 / 2 pairs of scores 1 < 2 < 3, the best response first.
        ({"instruction": ASK, "completions": SCORES}, [("No.", "Hm."), ("No.", "Yes."), ("Hm.", "Yes.")], 0),
        ({"prompt": ASK, "chosen": ["a", "b"], "rejected": ["c"]}, [("a", "c"), ("b", "c")], 0),
    ],
)
def test_all_pairs(tmp_path, record, every, ties):
    """With pairs_per_prompt = all a record gives every pair of its answers; ties are dropped and counted."""
    other = {"prompt": ASK, "answers": answers("answer", "rank", 1, 2)} if "answers" in record else record
    settings = {"text": "raw", "pairs_per_prompt": "all"}
    found, lines = read(chat_model(tmp_path, None), tmp_path, record, other, **settings)
    assert [(each.chosen, each.rejected) for each in found if each.index == 0] == every
    assert (f"  dropped {ties}: no answer is better than the other (line 1)" in lines) == bool(ties)
    several = f" as {len(found)} pairs" * (len(found) > 1 + bool(every))
    assert lines[0].endswith(f": 2 records read, {1 + bool(every)} kept{several}")


# Columns

MINE = {"q": ASK, "good": "Yes.", "bad": "No.", "by": 2.5, "prompt": "not this", "label": "x"}
NAMES = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        (MINE, NAMES | {"margin": "by"}, pair(margin=2.5)),
        ({"q": ASK, **TEXTS, "who": "Be brief."}, {"prompt": "q", "system": "who"}, pair(BRIEF, Q)),
        ({"talk": [Q, A]}, {"messages": "talk"}, one()),
        ({"prompt": ASK, "reply": "Yes.", "ok": 1}, {"completion": "reply", "label": "ok"}, one(label=True)),
        # Of a record with two shapes, the one that reads what is named.
        ({"messages": [Q, A], "prompt": ASK, **TEXTS}, {"messages": "messages"}, one()),
        # A name without a key takes a column away.
        ({"prompt": ASK, "completion": "Yes.", "label": "x"}, {"label": ""}, one()),
        ({"prompt": ASK, "margin": 3, **TEXTS}, {"margin": ""}, pair()),
    ],
)
def test_columns(tmp_path, record, columns, expected):
    """data.columns says which keys are read as what."""
    ((found,), lines) = read(chat_model(tmp_path, None), tmp_path, record, columns=columns)
    assert found.record == expected
    told = [f"{name} = {key}" for name, key in columns.items() if name != key and key]
    assert all(any(each in line for line in lines) for each in told)


@pytest.mark.parametrize("there", [{}, {"who": None}, {"who": ""}])
def test_optional_column(tmp_path, there):
    """A record may lack the system turn that data.columns names, the first one too; a file may not, and no
    record its prompt: it is refused with the keys that it has."""
    records = {"prompt": ASK, **TEXTS, **there}, {"prompt": ASK, **TEXTS, "who": "Be brief."}
    model, columns = chat_model(tmp_path, None), {"system": "who"}
    found, _ = read(model, tmp_path, *records, columns=columns)
    assert [each.record for each in found] == [pair(), pair(BRIEF, Q)]
    with pytest.raises(UserError, match="no record has the key of data.columns.system = 'how'; its keys are"):
        read(model, tmp_path, *records, columns={"system": "how"})
    said = ":1: no key 'question', which data.columns.prompt names; its keys are q, chosen, rejected"
    with pytest.raises(UserError, match=said):
        read(model, tmp_path, {"q": ASK, **TEXTS}, columns={"prompt": "question"})


@pytest.mark.parametrize(
    ("record", "good", "why"),
    [
        ({"messages": [A, Q, A]}, {"messages": [Q, A]}, "no prompt: nothing stands before"),
        ({"prompt": [BRIEF], "chosen": [Q, A], "rejected": [Q, B]}, {"prompt": [Q]}, "chosen does not rep"),
        ({"prompt": ASK, "preference_strength": 0, **OF_TWO}, {"preference_strength": 1}, "no answer is b"),
    ],
)
def test_dropped(tmp_path, record, good, why):
    """A conversation without a prompt is dropped, one that would lose a part, and a preference of zero."""
    found, lines = read(chat_model(tmp_path, None), tmp_path, record | good, record)
    assert [each.index for each in found] == [0]
    assert any(line.startswith(f"  dropped 1: {why}") for line in lines)
