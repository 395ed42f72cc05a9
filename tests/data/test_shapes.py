"""Preferences in every shape in which they are published become the same pairs of messages."""

import json

import pytest
from chat_model import SMOLLM2, chat_model, turn

from minidpo.data import DataReport, Tokenizer, read_preferences
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import refusal, write

Q, A, B, C = (
    turn("user", "Is it?"),
    turn("assistant", "Yes."),
    turn("assistant", "No."),
    turn("assistant", "Hm."),
)
BRIEF = turn("system", "Be brief.")


def pair(*prompt: dict, chosen: dict = A, rejected: dict = B, **more: object) -> dict:
    return {"prompt": list(prompt or [Q]), "chosen": [chosen], "rejected": [rejected], **more}


def one(*prompt: dict, **more: object) -> dict:
    return {"prompt": list(prompt or [Q]), "completion": [A], **more}


def says(speaker: str, message: dict) -> dict:
    """A message as sharegpt writes it."""
    return {"from": speaker, "value": message["content"]}


def answers(key: str, worth: str, *numbers: float) -> list[dict]:
    """The answers Yes., No. and Hm. with these ranks or scores."""
    return [{key: each["content"], worth: n} for each, n in zip((A, B, C), numbers, strict=False)]


ASK, TEXTS = "Is it?", {"chosen": "Yes.", "rejected": "No."}
OF_TWO = {"response_1": "No.", "response_2": "Yes."}
SHP = {"history": ASK, "human_ref_A": "No.", "human_ref_B": "Yes.", "score_A": 2, "score_B": 9}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
SHAREGPT_CALL = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}

SHAPES = {
    # Text, messages, and mixtures of them
    "text": ({"prompt": ASK, **TEXTS}, pair()),
    "messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, pair()),
    "message": ({"prompt": [Q], "chosen": A, "rejected": B}, pair()),
    "text prompt": ({"prompt": ASK, "chosen": [A], "rejected": [B]}, pair()),
    "text responses": ({"prompt": [BRIEF, Q], **TEXTS}, pair(BRIEF, Q)),
    "one text response": ({"prompt": [Q], "chosen": "Yes.", "rejected": [B]}, pair()),
    "conversations": ({"chosen": [Q, A, Q, A], "rejected": [Q, A, Q, B]}, pair(Q, A, Q)),
    "repeated text": ({"prompt": ASK, "chosen": [Q, A], "rejected": [Q, B]}, pair()),
    "repeated messages": ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]}, pair()),
    "system": ({"prompt": ASK, "system": "Be brief.", **TEXTS}, pair(BRIEF, Q)),
    "scores": ({"prompt": ASK, "score_chosen": 3, "score_rejected": 1, **TEXTS}, pair(margin=2.0)),
    # Other names; a prompt that is called so wins
    "two prompts": ({"prompt": ASK, "question": "Who?", "input": "What?", **TEXTS}, pair()),
    "orca": ({"system": "Be brief.", "question": ASK, **TEXTS}, pair(BRIEF, Q)),
    "distilabel": ({"system": "", "input": ASK, "margin": 1, **TEXTS}, pair(margin=1.0)),
    "alpaca": ({"instruction": "Is", "input": "it?", **TEXTS}, pair(turn("user", "Is\nit?"))),
    "rasbt": ({"instruction": ASK, "input": "", "output": "Yes", **TEXTS}, pair()),
    "sharegpt": (
        {"conversations": [says("human", Q)], "chosen": says("gpt", A), "rejected": says("gpt", B)},
        pair(),
    ),
    "sharegpt lists": (
        {"chosen": [says("human", Q), says("gpt", A)], "rejected": [says("user", Q), says("chatbot", B)]},
        pair(),
    ),
    "sharegpt tools": (
        {
            "conversations": [says("human", Q), SHAREGPT_CALL, {"from": "observation", "value": "1"}],
            "chosen": says("gpt", A),
            "rejected": says("gpt", B),
        },
        pair(Q, CALL, turn("tool", "1")),
    ),
    # Two answers and a preference
    "HelpSteer2": ({"prompt": ASK, "preference_strength": 2, **OF_TWO}, pair(margin=2.0)),
    "HelpSteer2, first": (
        {"prompt": ASK, "preference_strength": -1, "response_1": "Yes.", "response_2": "No."},
        pair(margin=1.0),
    ),
    "HelpSteer3": (
        {
            "context": [Q, A, Q],
            "response1": "Yes.",
            "response2": "No.",
            "overall_preference": -3,
            "individual_preference": [{"score": -3, "reasoning": "r"}],
        },
        pair(Q, A, Q, margin=3.0),
    ),
    "HelpSteer2, .csv": ({"prompt": ASK, "preference_strength": "2", **OF_TWO}, pair(margin=2.0)),
    "SHP": (SHP | {"labels": 0}, pair(margin=7.0)),  # 9 - 2
    "SHP, A": (SHP | {"labels": 1}, pair(chosen=B, rejected=A, margin=-7.0)),
    # Several answers: the best against the worst
    "Nectar": ({"prompt": ASK, "answers": answers("answer", "rank", 1, 7, 2)}, pair(margin=6.0)),
    "UltraFeedback": (
        {"instruction": ASK, "completions": answers("response", "overall_score", 8.5, 2, 5)},
        pair(margin=6.5),
    ),
    "fine-grained": (
        {"instruction": ASK, "completions": answers("response", "fine-grained_score", 4, 1.5)},
        pair(margin=2.5),
    ),
    "reward-bench-2": ({"prompt": ASK, "chosen": ["Yes."], "rejected": ["No.", "Hm."]}, pair()),
    # One response
    "SFT messages": ({"messages": [BRIEF, Q, A]}, one(BRIEF, Q)),
    "SFT completion": ({"prompt": ASK, "completion": "Yes."}, one()),
    "SFT completion as messages": ({"prompt": [Q], "completion": [A]}, one()),
    "SFT chosen": ({"prompt": ASK, "chosen": "Yes."}, one()),
    "SFT null": ({"prompt": ASK, "chosen": "Yes.", "rejected": None}, one()),
    "SFT alpaca": ({"instruction": "Is", "input": "it?", "output": "Yes."}, one(turn("user", "Is\nit?"))),
    "SFT LIMA": ({"conversations": [ASK, "Yes."]}, one()),
    "SFT sharegpt": (
        {"conversations": [says("system", BRIEF), says("human", Q), says("gpt", A)]},
        one(BRIEF, Q),
    ),
    **{
        f"label {label!r}": ({"prompt": ASK, "completion": "Yes.", "label": label}, one(label=means))
        for label, means in (
            (True, True),
            (1, True),
            ("True", True),
            (False, False),
            (0, False),
            ("false", False),
        )
    },
    "labelled conversation": ({"messages": [Q, A], "label": False}, one(label=False)),
    "other label": ({"messages": [Q, A], "label": "chat"}, one()),
}


def read(tokenizer: Tokenizer, path, *records: dict, kind: str = "chatml", **settings: object):
    """The pairs of a file of records, text put through the template, and the report's lines."""
    report, data = DataReport(), DataSection(**{"text": "template"} | settings)
    file = write(path / "a.jsonl", *records)
    return list(read_preferences(file, report, template=tokenizer.chat_template(kind), data=data)), list(
        report.lines()
    )


def chatml(messages: list[dict]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"sharegpt tools"}))  # chatml writes no tool calls.
def test_shapes(tmp_path, name):
    """A record of each shape is the expected pair, and its ids are those of the messages by hand."""
    record, expected = SHAPES[name]
    tokenizer = chat_model(tmp_path, None, eos_token="<|im_end|>")
    ((found,), _) = read(tokenizer, tmp_path, record)
    assert found.record == expected
    assert (found.margin, found.label) == (expected.get("margin"), expected.get("label"))
    prompt = chatml(expected["prompt"]) + "<|im_start|>assistant\n"
    ids = tokenizer.encode_pair(found)
    assert ids.prompt == tokenizer.encode(prompt)
    for key, response in zip(("chosen", "rejected"), ids.responses, strict=False):
        (message,) = expected.get(key) or expected["completion"]
        assert response == tokenizer.encode(message["content"] + "<|im_end|>", add_special_tokens=False)


@pytest.mark.parametrize("name", SHAPES)
def test_as_transformers(tmp_path, name):
    """The ids of each shape are those that transformers makes of the same messages."""
    pytest.importorskip("jinja2")
    record, expected = SHAPES[name]
    template = SMOLLM2.replace("message['content']", "message['content'] | default('', true)")
    ours = chat_model(tmp_path, template, eos_token="<|im_end|>")
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    ((found,), _) = read(ours, tmp_path, record, kind="model")
    ids = ours.encode_pair(found)
    asked = theirs.apply_chat_template(expected["prompt"], add_generation_prompt=True, return_dict=False)
    assert ids.prompt == asked
    for key, response in zip(("chosen", "rejected"), ids.responses, strict=False):
        answer = expected.get(key) or expected["completion"]
        whole = theirs.apply_chat_template(expected["prompt"] + answer, return_dict=False)
        assert ids.prompt + response == whole[: len(ids.prompt + response)]
        assert not theirs.decode(whole[len(ids.prompt + response) :]).strip()  # the template's newline


# What is told


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("orca", ["read as: orca pairs: prompt = question, system = system"]),
        (
            "HelpSteer3",
            [
                "read as: HelpSteer3 preferences: prompt = context, first = response1, second = response2,"
                " margin = overall_preference",
                "keys that are not read: individual_preference",
            ],
        ),
        ("rasbt", ["read as: alpaca pairs: prompt = instruction", "keys that are not read: output"]),
        ("Nectar", ["pairs of several responses: best-worst (data.pairs_per_prompt)"]),
    ],
)
def test_told(tmp_path, name, lines):
    """The report names the shape, the keys that are read and those that are not."""
    _, said = read(chat_model(tmp_path, None), tmp_path, SHAPES[name][0])
    assert [line for line in lines if f"  {line}" not in said] == []


def test_first_record_decides(tmp_path):
    """Records that lack a key of the first one's shape are refused, whatever else they could be read as."""
    orca, hh = SHAPES["orca"][0], {"chosen": "a", "rejected": "b"}
    assert refusal(write(tmp_path / "a.jsonl", {"question": ASK, **TEXTS}, hh)).startswith(
        ":2: no key 'question'"
    )
    missing = refusal(
        write(tmp_path / "a.jsonl", {"prompt": ASK, "chosen": "a", "rejected": "b"}, {"prompt": ASK})
    )
    assert missing.startswith(":2: no key 'chosen'; its keys are prompt; give chosen, rejected, and prompt")
    found, _ = read(chat_model(tmp_path, None), tmp_path, orca | {"system": None}, orca)
    assert [len(each.record["prompt"]) for each in found] == [1, 2]


# Several pairs of one record

RANKS = answers("answer", "rank", 2, 1, 2)


@pytest.mark.parametrize(
    ("record", "every", "ties"),
    [
        # Of ranks 2, 1, 2 the second answer beats both others, which tie.
        ({"prompt": ASK, "answers": RANKS}, [("No.", "Yes."), ("No.", "Hm.")], 1),
        ({"prompt": ASK, "answers": RANKS[::2]}, [], 1),
        # 3 * 2 / 2 pairs of scores 1 < 2 < 3, the best response first.
        (
            {"instruction": ASK, "completions": answers("response", "overall_score", 1, 3, 2)},
            [("No.", "Hm."), ("No.", "Yes."), ("Hm.", "Yes.")],
            0,
        ),
        ({"prompt": ASK, "chosen": ["a", "b"], "rejected": ["c"]}, [("a", "c"), ("b", "c")], 0),
    ],
)
def test_all_pairs(tmp_path, record, every, ties):
    """With pairs_per_prompt = all a record gives every pair of its answers; ties are dropped and counted."""
    other = {key: ["x", "y"] if key == "chosen" else value for key, value in record.items()}
    other |= {key: answers("answer", "rank", 1, 2) for key in ("answers",) if key in record}
    found, lines = read(
        chat_model(tmp_path, None), tmp_path, record, other, text="raw", pairs_per_prompt="all"
    )
    assert [(each.chosen, each.rejected) for each in found if each.index == 0] == every
    tie = f"  dropped {ties}: no answer is better than the other (line 1)"
    assert (tie in lines) == bool(ties)
    kept = 1 + bool(every)
    assert lines[0].endswith(
        f": 2 records read, {kept} kept" + (f" as {len(found)} pairs" * (len(found) > kept))
    )


def test_tie(tmp_path):
    """A preference of zero is dropped and counted."""
    record = SHAPES["HelpSteer2"][0]
    found, lines = read(chat_model(tmp_path, None), tmp_path, record | {"preference_strength": 0}, record)
    assert [each.index for each in found] == [1]
    assert "  dropped 1: no answer is better than the other (line 1)" in lines


# Columns

MINE = {"q": ASK, "good": "Yes.", "bad": "No.", "by": 2.5, "prompt": "not this", "label": "x"}
NAMES = {"prompt": "q", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        (MINE, NAMES, pair()),
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


def test_missing_column(tmp_path):
    """A named column that a record lacks is refused, with the keys that the record has."""
    said = "a.jsonl:1: no key 'question', which data.columns.prompt names; its keys are q, chosen, rejected"
    with pytest.raises(UserError, match=said):
        read(chat_model(tmp_path, None), tmp_path, {"q": ASK, **TEXTS}, columns={"prompt": "question"})


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"chosen": [Q, A], "rejected": "No."}, "'rejected' is no list of messages; give one"),
        ({"messages": "Is it?"}, "'messages' is no list of messages; give one"),
        (
            {"chosen": "a", "rejected": "b"},
            'HH dialogues, which are text of their own; data.text = "template"',
        ),
        (
            {"prompt": "\n\nHuman: 1?\n\nAssistant: ", **TEXTS},
            'HH dialogues, which are text of their own; data.text = "template"',
        ),
        (
            {"conversations": [{"from": "bing", "value": "?"}]},
            "a message in 'conversations' is from 'bing'; give",
        ),
        (
            {"conversations": [says("human", Q), {"from": "function_call", "value": "f()"}]},
            "a function_call in 'conversations' is no call of a tool; give",
        ),
        (
            {"prompt": ASK, "completion": "a", "label": "good"},
            "'label' is neither true nor false; give one of",
        ),
        (
            {"prompt": ASK, "answers": [{"answer": "a", "rank": "best"}]},
            "'rank' is no number ('best'); give one",
        ),
        (
            {"prompt": ASK, "answers": [{"rank": 1}]},
            "an answer in 'answers' has no 'answer'; give each its text",
        ),
        ({"prompt": ASK, "answers": {"a": 1}}, "'answers' is no list of objects; give one object per answer"),
        ({"prompt": ASK, "preference_strength": None, **OF_TWO}, "no key 'chosen'"),
        ({"prompt": ASK, "preference_strength": True, **OF_TWO}, "'preference_strength' is no number (True)"),
    ],
)
def test_refused(tmp_path, record, said):
    """A value of another kind is refused in one line with file, line, key, and what would be right."""
    with pytest.raises(UserError) as caught:
        read(chat_model(tmp_path, None), tmp_path, record)
    message = str(caught.value).removeprefix(f"{tmp_path}/a.jsonl:1: ")
    assert message.startswith(said) and json.dumps(message).count("\\n") == 0


# One record among others


@pytest.mark.parametrize(
    ("label", "means"), [("true", True), ("False", False), ("1", True), ("0.0", False), (1.0, True)]
)
def test_label(tmp_path, label, means):
    """A label of a .csv file is text, and as some programs write it a number."""
    ((found,), _) = read(
        chat_model(tmp_path, None), tmp_path, {"prompt": ASK, "completion": "a", "label": label}
    )
    assert found.label is means


@pytest.mark.parametrize("there", [{}, {"who": None}, {"who": ""}])
def test_optional_column(tmp_path, there):
    """A record may lack the system turn that data.columns names, the first one too; a file may not."""
    records = {"prompt": ASK, **TEXTS, **there}, {"prompt": ASK, **TEXTS, "who": "Be brief."}
    model, columns = chat_model(tmp_path, None), {"system": "who"}
    found, _ = read(model, tmp_path, *records, columns=columns)
    assert [each.record for each in found] == [pair(), pair(BRIEF, Q)]
    with pytest.raises(
        UserError, match="a.jsonl: no record has the key of data.columns.system = 'how'; its "
    ):
        read(model, tmp_path, *records, columns={"system": "how"})


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": [A, Q, A]}, "no prompt: nothing stands before the assistant's first turn"),
        ({"prompt": [BRIEF], "chosen": [Q, A], "rejected": [Q, B]}, "chosen does not repeat `prompt`, and"),
    ],
)
def test_dropped(tmp_path, record, why):
    """A conversation without a prompt is dropped, and one that would lose a part of it."""
    good = record | ({"messages": [Q, A]} if "messages" in record else {"prompt": [Q]})
    found, lines = read(chat_model(tmp_path, None), tmp_path, good, record)
    assert [each.index for each in found] == [0]
    assert any(line.startswith(f"  dropped 1: {why}") for line in lines)
