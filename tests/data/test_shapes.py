"""Preferences in every shape in which they are published become the same pairs of messages."""

import json

import pytest
from chat_model import chat_model, turn
from chat_model import read as read_pairs

from minidpo.data import Tokenizer
from minidpo.errors import UserError
from record_files import refusal, write

Q, A, B, C = turn("user", "Is it?"), *(turn("assistant", text) for text in ("Yes.", "No.", "Hm."))
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


HUMAN, GPT, WORSE = says("human", Q), says("gpt", A), says("gpt", B)
ASK, TEXTS = "Is it?", {"chosen": "Yes.", "rejected": "No."}
OF_TWO = {"response_1": "No.", "response_2": "Yes."}
STEER3 = {"context": [Q, A, Q], "response1": "Yes.", "response2": "No.", "individual_preference": [3]}
SHP = {"history": ASK, "human_ref_A": "No.", "human_ref_B": "Yes.", "score_A": 2, "score_B": 9}
SWAPPED, SCORES = pair(chosen=B, rejected=A), answers("response", "overall_score", 8.5, 2, 5)
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
    # Messages in JSON text, as .csv files have them
    "JSON": ({name: json.dumps(value) for name, value in pair().items()}, pair()),
    "JSON conversations": ({"chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])}, pair()),
    "JSON sharegpt": ({"conversations": json.dumps([HUMAN, GPT])}, one()),
    "JSON responses": ({"prompt": ASK, "chosen": json.dumps(A), "rejected": json.dumps([B])}, pair()),
    "scores": ({"prompt": ASK, "score_chosen": 3, "score_rejected": 1, **TEXTS}, pair(margin=2.0)),
    # Other names; a prompt that is called so wins
    "two prompts": ({"prompt": ASK, "question": "Who?", "input": "What?", **TEXTS}, pair()),
    "orca": ({"system": "Be brief.", "question": ASK, **TEXTS}, pair(BRIEF, Q)),
    "distilabel": ({"system": "", "input": ASK, "margin": 1, **TEXTS}, pair(margin=1.0)),
    "alpaca": ({"instruction": "Is", "input": "it?", **TEXTS}, pair(turn("user", "Is\nit?"))),
    "rasbt": ({"instruction": ASK, "input": "", "output": "Yes", **TEXTS}, pair()),
    "sharegpt": ({"conversations": [HUMAN], "chosen": GPT, "rejected": WORSE}, pair()),
    "sharegpt lists": ({"chosen": [HUMAN, GPT], "rejected": [says("user", Q), says("chatbot", B)]}, pair()),
    "sharegpt tools": (
        {"conversations": [HUMAN, says("observation", Q)], "chosen": [A], "rejected": [B]},
        pair(Q, turn("tool", ASK)),
    ),
    # Two answers and a preference
    "HelpSteer2": ({"prompt": ASK, "preference_strength": 2, **OF_TWO}, pair(margin=2.0)),
    "HelpSteer2, first": ({"prompt": ASK, "preference_strength": -1, **OF_TWO}, SWAPPED | {"margin": 1.0}),
    "HelpSteer3": (STEER3 | {"overall_preference": -3}, pair(Q, A, Q, margin=3.0)),
    "HelpSteer2, .csv": ({"prompt": ASK, "preference_strength": "2", **OF_TWO}, pair(margin=2.0)),
    "SHP": (SHP | {"labels": 0}, pair(margin=7.0)),  # 9 - 2
    "SHP, A": (SHP | {"labels": 1}, SWAPPED | {"margin": -7.0}),
    # Several answers: the best against the worst
    "Nectar": ({"prompt": ASK, "answers": answers("answer", "rank", 1, 7, 2)}, pair(margin=6.0)),
    "UltraFeedback": ({"instruction": ASK, "completions": SCORES}, pair(margin=6.5)),
    "reward-bench-2": ({"prompt": ASK, "chosen": ["Yes."], "rejected": ["No.", "Hm."]}, pair()),
    # One response
    "SFT messages": ({"": 7, "messages": [BRIEF, Q, A]}, one(BRIEF, Q)),
    "SFT completion": ({"prompt": ASK, "completion": "Yes."}, one()),
    "SFT completion as messages": ({"prompt": [Q], "completion": [A]}, one()),
    "SFT chosen": ({"prompt": ASK, "chosen": "Yes."}, one()),
    "SFT null": ({"prompt": ASK, "chosen": "Yes.", "rejected": None}, one()),
    "SFT alpaca": ({"instruction": "Is", "input": "it?", "output": "Yes."}, one(turn("user", "Is\nit?"))),
    "SFT sharegpt": ({"conversations": [says("system", BRIEF), HUMAN, GPT]}, one(BRIEF, Q)),
    **{
        f"label {label!r}": ({"prompt": ASK, "completion": "Yes.", "label": label}, one(label=means))
        for means, labels in ((True, (True, 1, 1.0, "True", "1")), (False, (False, 0, "false", "0.0")))
        for label in labels  # as JSON and .csv files have it
    },
}


def read(tokenizer: Tokenizer, path, *records: dict, **settings: object):
    """The pairs of a file of records, text put through the template, and the report's lines."""
    return read_pairs(tokenizer.chat_template("chatml"), path, *records, **{"text": "template"} | settings)


def chatml(messages: list[dict]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path, name):
    """A record of each shape is the expected pair, and its ids are those of the messages by hand."""
    record, expected = SHAPES[name]
    tokenizer = chat_model(tmp_path, None, eos_token="<|im_end|>")
    ((found,), _) = read(tokenizer, tmp_path, record)
    assert found.record == expected
    assert (found.margin, found.label) == (expected.get("margin"), expected.get("label"))
    prompt = chatml(expected["prompt"]) + "<|im_start|>assistant\n"
    ids = tokenizer.encode_pairs([found])[0]
    assert ids.prompt == tokenizer.encode(prompt)
    for key, response in zip(("chosen", "rejected"), ids.responses, strict=False):
        (message,) = expected.get(key) or expected["completion"]
        assert response == tokenizer.encode(message["content"] + "<|im_end|>", add_special_tokens=False)


# What is told


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("SFT completion", []),
        ("scores", ["1 pairs with a margin, for loss.margin_from_data and data.min_margin"]),
        ("orca", ["read as: prompt = question"]),
        ("rasbt", ["read as: prompt = instruction", "keys that are not read: output"]),
    ],
)
def test_told(tmp_path, name, lines):
    """The report names the keys that are read under another name, and those that are not read."""
    _, said = read(chat_model(tmp_path, None), tmp_path, SHAPES[name][0])
    assert said[1:] == [f"  {line}" for line in lines]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"question": ASK, **TEXTS}, TEXTS], "no key 'question'"),
        ([{"prompt": ASK, "chosen": "a"}, {"prompt": ASK, **TEXTS}], "'rejected' in a file whose first reco"),
    ],
)
def test_first_record_decides(tmp_path, records, said):
    """Records that do not have the first one's shape are refused, whatever else they could be read as."""
    assert refusal(write(tmp_path / "a.jsonl", *records)).startswith(f":2: {said}")


def test_json_text(tmp_path):
    """Text is messages if the first record's is; in a file of text a response may look like messages."""
    text = {"prompt": ASK, **TEXTS}
    in_json = text | {"chosen": json.dumps([A])}
    found, _ = read(chat_model(tmp_path, None), tmp_path, text, in_json, text="raw")
    assert [each.chosen for each in found] == ["Yes.", json.dumps([A])]
    with pytest.raises(UserError, match=r"pairs.jsonl:2: 'chosen' is not JSON \(Expecting value"):
        read(chat_model(tmp_path, None), tmp_path, in_json, text)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"chosen": [Q, A], "rejected": "No."}, "'rejected' is no list of messages; give one"),
        ({"prompt": ASK, **TEXTS, "chosen": str([A])}, "'chosen' is not JSON (Expecting property name enc"),
        ({"messages": "Is it?"}, "'messages' is no list of messages; give one"),
        ({"chosen": "a", "rejected": "b"}, "HH dialogues, which are text of their own; data.text ="),
        ({"prompt": "\n\nHuman: 1?\n\nAssistant: ", **TEXTS}, "HH dialogues, which are text of their own;"),
        ({"conversations": [says("bing", Q)]}, "a message in 'conversations' is from 'bing'; give one of"),
        ({"prompt": ASK, "completion": "a", "label": "good"}, "'label' is neither true nor false; give one"),
        ({"prompt": ASK, "answers": answers("answer", "rank", "best")}, "'rank' is no number ('best'); give"),
        ({"prompt": ASK, "answers": [{"rank": 1}]}, "an answer in 'answers' has no 'answer'; give each its"),
        ({"instruction": "Is", "input": 5, **TEXTS}, "'input' is of type int; give a string"),
        ({"instruction": "Is", "input": "\ud83d", **TEXTS}, "'input' has half a surrogate pair"),
        ({"prompt": ASK, "answers": {"a": 1}}, "'answers' is no list of objects; give one object per answer"),
        ({"prompt": ASK, "preference_strength": None, **OF_TWO}, "'preference_strength' is null; give a val"),
        ({"prompt": ASK, "chosen": None}, "'chosen' is null; give a value"),
        ({"prompt": ASK, "preference_strength": True, **OF_TWO}, "'preference_strength' is no number (True)"),
    ],
)
def test_refused(tmp_path, record, said):
    """A value of another kind is refused in one line with file, line, key, and what would be right."""
    with pytest.raises(UserError) as caught:
        read(chat_model(tmp_path, None), tmp_path, record)
    assert str(caught.value).startswith(f"{tmp_path}/pairs.jsonl:1: {said}") and "\n" not in str(caught.value)
