"""The messages of a record, and what it may have beside them for a chat template.

    {"role": "user", "content": "Is it?"}
    {"role": "user", "content": [{"type": "text", "text": "Is it?"}]}
    {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "function": {...}}]}
    {"from": "human", "value": "Is it?"}    the first one, as sharegpt writes it

All other keys are kept, because a chat template may read them: `name`, `reasoning_content`, `tool_call_id`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from minidpo.data.records import BadRecord, check_characters, printable
from minidpo.errors import one_line

ASSISTANT = "assistant"  # the role of the model, whose words are scored

Message = dict[str, Any]
Given = Mapping[str, Any]  # what a record has its chat template given beside messages

_SET_BY_US = {"messages", "add_generation_prompt"}

# Where a message may have its reasoning, the first of them the standard name.
_REASONING = ("reasoning_content", "thinking", "reasoning")

# Who speaks in sharegpt's form. A function_call's value is the call in JSON.
_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatbot", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}


def messages_of(record: dict, key: str) -> list[Message]:
    """The messages under a key of a record, without their null keys. Raises `BadRecord` for anything else.

    A null key means no key: Arrow and OpenAI write `"tool_calls": null` into messages that call no tool.
    """
    if not isinstance(record[key], list):
        raise BadRecord(f"{key!r} is no list of messages", "; give one, as under the other keys")
    return [_checked(message, key) for message in record[key]]


def text_of(message: Message) -> str | None:
    """The content of a message as one text; None if it has none."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def with_reasoning(message: Message) -> Message:
    """The message with its reasoning, if it has any, under both names that chat templates read, as in
    transformers 5."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning} | message | {"reasoning_content": reasoning}


def without_reasoning(message: Message) -> Message:
    """The message without the reasoning that it may have under keys of its own or before "</think>"."""
    if message["role"] != ASSISTANT:
        return message
    kept = {key: value for key, value in message.items() if key not in _REASONING}
    text = text_of(kept)
    return kept if text is None else kept | {"content": text.rpartition("</think>")[2].lstrip("\n")}


def words_of(message: Message) -> Iterator[str]:
    """Every text in a message, however deep, but its role and the types of its parts and tool calls."""
    left: list[Any] = [message]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [inner for key, inner in value.items() if key not in ("role", "type")]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and value.strip():
            yield value.strip()


def first_assistant(messages: list[Message]) -> int:
    """The place of the assistant's first turn, with which a response begins; len(messages) without one."""
    return next((i for i, message in enumerate(messages) if message["role"] == ASSISTANT), len(messages))


def shared_turns(chosen: list[Message], rejected: list[Message], reads: Callable[[str], bool]) -> int:
    """How many turns are the prompt of two conversations: as many as both begin with, the last of each
    excepted, so that the assistant's turn is next in both.

    Where users said different things, the prompt ends before the last shared turn of the assistant. Keys that
    no template reads may differ: `reads` says of which.
    """

    def read(message: Message) -> Message:
        keys = {key: value for key, value in message.items() if reads(key)}
        return keys | {"content": text_of(message)}

    both = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [*(a == b or read(a) == read(b) for a, b in both), False].index(False)
    cuts = range(shared, 0, -1)
    return next((n for n in cuts if chosen[n]["role"] == rejected[n]["role"] == ASSISTANT), shared)


def repeats(prompt: list[Message], conversation: list[Message]) -> bool:
    """Whether a conversation has the last message of its prompt."""
    return not prompt or text_of(prompt[-1]) in map(text_of, conversation)


def with_system(record: dict, prompt: list[Message]) -> list[Message]:
    """The prompt, begun with the record's `system` unless it has a system turn of its own."""
    system = record.get("system")
    if not isinstance(system, str) or not system.strip() or prompt[0]["role"] == "system":
        return prompt
    check_characters(system, "'system'")
    return [{"role": "system", "content": system}, *prompt]


def given_of(record: dict) -> Given:
    """What the record has its chat template given: `chat_template_kwargs`, and `tools`, which may be JSON."""
    tools, others = record.get("tools"), record.get("chat_template_kwargs") or {}
    try:
        if isinstance(tools, str):
            tools = json.loads(tools or "null")
    except (ValueError, RecursionError) as error:
        raise BadRecord("'tools' is not JSON", f" ({one_line(error)}); give a list of tools") from None
    if not (tools is None or isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecord("'tools' is no list of objects", "; give one object per tool")
    if not isinstance(others, dict) or _SET_BY_US & others.keys():
        right = f"; give an object without {' and '.join(sorted(_SET_BY_US))}"
        raise BadRecord("'chat_template_kwargs' cannot be given to a template", right)
    return {"tools": tools} | {name: value for name, value in others.items() if value is not None}


def _checked(message: Any, key: str) -> Message:
    if not isinstance(message, dict):
        right = "; a message is {'role': 'user', 'content': '...'}"
        raise BadRecord(f"a message in {key!r} is of type {type(message).__name__}", right)
    message = {name: value for name, value in message.items() if value is not None}
    if "role" not in message and {"from", "value"} <= message.keys():
        message = _of_sharegpt(message, key)
    if isinstance(message.get("content"), list):
        message["content"] = [_text_part(part, key) for part in message["content"]]
    for name, text in (("role", message.get("role")), ("content", text_of(message))):
        if text is None and name == "content" and message.get("tool_calls"):
            continue
        if not isinstance(text, str):
            right = "; a message is {'role': 'user', 'content': '...'}"
            raise BadRecord(f"a message in {key!r} has no text under {name!r}", right)
        check_characters(text, f"{name!r} of a message in {key!r}")
    return message


def _of_sharegpt(message: Message, key: str) -> Message:
    speaker, value = message.pop("from"), message.pop("value")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        right = f"; give one of {', '.join(_SPEAKERS)}"
        raise BadRecord(f"a message in {key!r} is from {printable(repr(speaker))[:40]}", right)
    if speaker != "function_call":
        return {"role": role, "content": value} | message
    try:
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, TypeError, KeyError, RecursionError):
        right = '; give {"name": ..., "arguments": {...}} as JSON'
        raise BadRecord(f"a function_call in {key!r} is no call of a tool", right) from None
    return {
        "role": role,
        "tool_calls": [{"type": "function", "function": each} for each in functions],
    } | message


def _text_part(part: Any, key: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    right = "; a part is {'type': 'text', 'text': '...'}, and no other is read"
    raise BadRecord(f"a message in {key!r} has a part of type {kind!r}"[:200], right)
