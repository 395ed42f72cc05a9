"""Prompts in text for a model with a chat template: through the template, raw, or asked about."""

import pytest
from chat_model import SMOLLM2, chat_model, turn

from minidpo.data import BadRecord, PairTokens, Prompt, Tokenizer, load_pairs, prompt_of
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import QUESTION, write

GLUED = {"prompt": "Is 2 + 2 four?", "chosen": "Yes, it is.", "rejected": "No."}
SPACED = GLUED | {"prompt": "Is 2 + 2 four? "}
AGAIN = f"{QUESTION} a{QUESTION}"


def load(tokenizer: Tokenizer, path, *records: dict, **settings: object) -> PairTokens:
    file = write(path / "a.jsonl", *records)
    data = {"train": [str(file)], "eval_pairs": 0, "max_length": 200, "max_prompt_length": 150} | settings
    return load_pairs(DataSection(**data), tokenizer, seed=0)[0]


@pytest.fixture
def chat(tmp_path) -> Tokenizer:
    return chat_model(tmp_path, SMOLLM2, eos_token="<|im_end|>")


@pytest.mark.parametrize(
    ("records", "stops"),
    [
        ([GLUED], True),
        ([GLUED, GLUED, SPACED], True),  # most are glued
        ([GLUED, SPACED], False),
        ([GLUED | {"chosen": "\nYes"}], False),
        ([GLUED, GLUED | {"prompt": "<|im_start|>user\nIs it?<|im_end|>"}], False),  # a special token
        ([GLUED, GLUED | {"prompt": QUESTION}], False),  # HH's turns in a prompt
        ([{"prompt": "Is it?", "completion": "Yes."}], True),
        ([GLUED | {"prompt": [turn("user", "Is it?")]}], False),  # messages
    ],
)
def test_asks(chat, tmp_path, records, stops):
    """Text that looks made for the template stops a run, which shows it and names both settings."""
    if not stops:
        assert len(load(chat, tmp_path, *records)) == len(records)
        return
    with pytest.raises(UserError) as caught:
        load(chat, tmp_path, *records)
    message, prompt = str(caught.value), records[0]["prompt"]
    assert 'data.text = "template"' in message and '"raw"' in message and f"read '{prompt}Yes" in message
    assert message.startswith(f"{tmp_path}/a.jsonl: ") and "\n" not in message
    assert len(load(chat, tmp_path, *records, text="raw")) == len(records)


def test_without_template(tokenizer, tmp_path):
    """For a model without a chat template text is raw, and asking for one names what is missing."""
    for settings, text in (({}, GLUED["prompt"]), ({"text": "template", "template": "hh"}, QUESTION)):
        prompt = load(tokenizer, tmp_path, GLUED, **settings).pair(0).prompt
        assert tokenizer.decode(prompt, special_tokens=True) == "<s>" + text
    with pytest.raises(UserError, match="no chat_template in tokenizer_config.json"):
        load(tokenizer, tmp_path, GLUED, text="template")


def test_same_side(chat, tmp_path):
    """A prompt in text has the same key through the template as raw: both runs hold out the same prompts."""
    records = [GLUED | {"prompt": f"Is it {i}?", "system": "Be brief."} for i in range(20)]
    keys = [load(chat, tmp_path, *records, text=text).key.tolist() for text in ("template", "raw")]
    assert keys[0] == keys[1] and len(set(map(tuple, keys[0]))) == 20


@pytest.mark.parametrize(
    ("record", "text", "begin"),
    [
        ({"prompt": "Is it?"}, "template", "user\nIs it?"),
        ({"question": "Is it?", "chosen": "a", "rejected": "b"}, "template", "user\nIs it?"),
        ({"prompt": "Is it?", "chosen": [turn("assistant", "a")]}, "raw", "user\nIs it?"),
        ({"q": "Is it?"}, "template", "user\nIs it?"),
        ({"messages": [turn("user", "Is it?"), turn("assistant", "a")]}, "raw", "user\nIs it?"),
        ({"prompt": "Is it?", "completion": [turn("assistant", "a")]}, "raw", "user\nIs it?"),
        ({"prompt": "Is it?", "chosen": ["a", "b"], "rejected": "c"}, "raw", "Is it?"),
        ({"prompt": "Is it?", "chosen": 7}, "raw", "Is it?"),  # The responses need not be right.
        ({"chosen": f"{AGAIN} b", "rejected": f"{AGAIN} c"}, "raw", AGAIN),
    ],
)
def test_prompts_to_sample(chat, record, text, begin):
    """A response is sampled for the prompt of any shape as it was trained on."""
    columns = {"prompt": "q"} if "q" in record else {}
    prompt = prompt_of(record, chat.chat_template(), DataSection(text=text, columns=columns))
    assert begin in prompt.text and (prompt == Prompt(begin)) == ("user" not in begin)


def test_no_prompt(chat):
    """A record without a prompt is told what is missing."""
    for record, said in (({"chosen": None}, "'chosen' is of type NoneType; give"), ({"x": 1}, "no prompt; ")):
        with pytest.raises(BadRecord, match=said):
            prompt_of(record, chat.chat_template())
