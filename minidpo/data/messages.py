"""The messages of a record, and what it may have beside them for a chat template.

    {"role": "user", "content": "Is it?"}
    {"role": "user", "content": [{"type": "text", "text": "Is it?"}]}    text parts are joined
    {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {...}}]}
    {"from": "human", "value": "Is it?"}    the first one, as sharegpt writes it

All other keys are kept, because a chat template may read them: `name`, `reasoning_content`, `tool_call_id`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minidpo.data.bad_record import BadRecord, check_characters, printable
from minidpo.errors import one_line

ASSISTANT = "assistant"  # the role of the model, whose words are scored

Message = dict[str, Any]
Turns = Sequence[Message]
Given = Mapping[str, Any]  # what a record has its chat template given beside messages

# Where a message may have its reasoning, the first of them the standard name.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Who speaks in sharegpt's form, and the role of that speaker.
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatbot", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
# How the text of a list of messages, or of one, begins; Python prints it with single quotes.
_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
_FORM = "; a message is {'role': 'user', 'content': '...'}"


class Prompt(NamedTuple):
    """What a response is sampled for."""

    text: str
    messages: list[Message] | None = None  # those of which the model's own template (not hh, chatml) made it
    add_special_tokens: bool = True
    tail: str | None = None  # what a reward model reads after a response, see ChatTemplate; None: EOS
    given: Given = {}  # to the template beside the messages
    index: int = 0  # type: ignore[assignment]  # the record's number in its file, from 0


def as_text(record: dict) -> list[str]:
    """The keys under which a record has messages in JSON text, because a .csv file has nothing but text."""
    return [key for key, value in record.items() if isinstance(value, str) and _AS_TEXT.match(value)]


def from_json(record: dict, key: str) -> Any:
    """What stands under a key; of text, what it spells. Raises `BadRecord` for text that is not JSON."""
    value = record.get(key)
    try:
        return json.loads(value or "null") if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        right = f" ({one_line(error)}); give a list, as it is or as json.dumps writes it"
        raise BadRecord(f"{key!r} is not JSON", right) from None


def with_reasoning(message: Message) -> Message:
    """The message with its reasoning, if any, under both names that templates read, as in transformers 5."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def without_reasoning(message: Message) -> Message:
    """The message without the reasoning that it may have under keys of its own or before "</think>"."""
    if message["role"] != ASSISTANT:
        return message
    kept = {key: value for key, value in message.items() if key not in _REASONING}
    text = kept.get("content")
    return kept if text is None else kept | {"content": text.rpartition("</think>")[2].lstrip("\n")}


def shared_turns(chosen: list[Message], rejected: list[Message], reads: Callable[[str], bool]) -> int:
    """How many turns are the prompt of two conversations: as many as both begin with, the last of each
    excepted, so that the assistant's turn is next in both. Where users said different things, that is its
    last shared one. Keys that no template reads may differ: `reads` says which are read."""

    def read(message: Message) -> Message:
        return {key: value for key, value in message.items() if key in ("role", "content") or reads(key)}

    both = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [*(a == b or read(a) == read(b) for a, b in both), False].index(False)
    cuts = range(shared, 0, -1)
    return next((n for n in cuts if chosen[n]["role"] == rejected[n]["role"] == ASSISTANT), shared)


def with_system(record: dict, prompt: list[Message]) -> list[Message]:
    """The prompt, begun with the record's `system` unless it has a system turn of its own."""
    system = record.get("system")
    if not isinstance(system, str) or not system.strip() or prompt[0]["role"] == "system":
        return prompt
    check_characters(system, "'system'")
    return [{"role": "system", "content": system}, *prompt]


def given_of(record: dict) -> Given:
    """What the record has its chat template given: `chat_template_kwargs`, and `tools`, which may be JSON."""
    tools, others = from_json(record, "tools"), record.get("chat_template_kwargs") or {}
    if not (tools is None or isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecord("'tools' is no list of objects", "; give one object per tool")
    if not isinstance(others, dict):
        raise BadRecord("'chat_template_kwargs' is no object", "; give one")
    return {"tools": tools} | {name: value for name, value in others.items() if value is not None}


def message_of(message: Any, key: str) -> Message:
    """A message under a key of a record. Raises `BadRecord` for anything else. A null key means no key: Arrow
    and OpenAI write `"tool_calls": null` into messages that call no tool."""
    if not isinstance(message, dict):
        raise BadRecord(f"a message in {key!r} is of type {type(message).__name__}", _FORM)
    message = {name: value for name, value in message.items() if value is not None}
    if "role" not in message and {"from", "value"} <= message.keys():
        speaker, value = message.pop("from"), message.pop("value")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            right = f"; give one of {', '.join(SPEAKERS)}"
            raise BadRecord(f"a message in {key!r} is from {printable(repr(speaker))[:40]}", right)
        message = {"role": role, "content": value} | message
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_part(part, key) for part in message["content"])
    for name in ("role", "content"):
        text = message.get(name)
        if text is None and name == "content" and message.get("tool_calls"):
            continue
        if not isinstance(text, str):
            raise BadRecord(f"a message in {key!r} has no text under {name!r}", _FORM)
        check_characters(text, f"{name!r} of a message in {key!r}")
    return message


def _text_part(part: Any, key: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    right = "; a part is {'type': 'text', 'text': '...'}, and no other is read"
    raise BadRecord(f"a message in {key!r} has a part of type {kind!r}"[:200], right)
