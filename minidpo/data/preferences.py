"""Readings of records to pairs: the prompt and the responses as the text that a model reads.

shapes.py and readings.py know how a record says them. Whatever its keys are, they have one of four forms:

    prompt and responses in text      left as they are (data.text = "raw"), or put through the chat template
    HH dialogues in text              split where the last response begins
    a prompt and responses, of which any is messages        written out by the chat template
    whole conversations in messages   the prompt is the turns that they share; of one, those before a response

A record that cannot be read (broken JSON, a missing key) is an error. One that reads well but can teach
nothing (no shared prompt, a blank response, two equal ones, a tie) is dropped and counted.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from minidpo.data.bad_record import BadRecord
from minidpo.data.chat_template import ChatTemplate
from minidpo.data.messages import Message, Prompt, as_text, from_json, given_of, shared_turns, with_system
from minidpo.data.pair_tokens import Ranges
from minidpo.data.readings import CONVERSATIONS, HH_DIALOGUES, MESSAGES, PROMPT_AND_RESPONSES, Reading, said
from minidpo.data.shapes import Shape, renamed, shape_of
from minidpo.data.turns import others_in_text
from minidpo.sections import DataSection

# The blank line before it belongs to the marker: "Assistant:" anywhere else is something that was said.
ASSISTANT = "\n\nAssistant:"

NO_DIALOGUE = "no '\\n\\nAssistant:' in a dialogue"
_BLANK = "nothing but blanks in a response"
DEFAULTS = DataSection()


class Unusable(ValueError):
    """A record that reads well and can teach nothing. The message is the reason for which it is dropped."""


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and two responses to it, or one."""

    prompt: str
    chosen: str
    rejected: str | None  # None: the record has one response: SFT, or a labelled one
    index: int = field(default=-1, compare=False)  # the record's number in its file, from 0
    margin: float | None = field(default=None, compare=False)  # by how much chosen is better, if it is known
    label: bool | None = None  # of a single response: desirable or not
    others: tuple[Ranges, ...] = ()  # per response: its characters that the assistant did not write
    tail: str | None = field(default=None, compare=False)  # what is put behind the responses; None: EOS
    add_special_tokens: bool = True  # false for the text of a chat template that wrote BOS itself
    file: int = field(default=0, compare=False)  # which of several files the record is from
    messages: bool = field(default=False, compare=False)  # whether a template made the prompt of messages
    unread: tuple[str, ...] = field(default=(), compare=False)  # keys of the record
    left_out: str = field(default="", compare=False)  # the end of the generation prompt, see ChatTemplate
    said: Any = field(default=None, compare=False, repr=False)  # prompt, responses and the rest, as messages

    @property
    def responses(self) -> list[str]:
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]

    @property
    def record(self) -> dict:
        """The pair, or the prompt with one response, as other programs read it: in text or messages."""
        prompt, responses, beside = self.said or (self.prompt, self.responses, {})
        names = ("completion",) if self.rejected is None else ("chosen", "rejected")
        known = (("margin", self.margin), ("label", self.label))
        more = {name: value for name, value in known if value is not None}
        return {"prompt": prompt, **dict(zip(names, responses, strict=True)), **more, **beside}


def split_hh(chosen_text: str, rejected_text: str) -> PreferencePair:
    """Split two HH dialogues into their prompt and responses, each at its own last "\\n\\nAssistant:".

    The prompt ends with that marker and the responses keep their leading space: nothing is lost. The longest
    common prefix would be wrong, because two responses that begin alike would leave half a word in it. Raises
    `ValueError` if a dialogue has no such turn, the prompts differ, or a response is blank.
    """
    pair = PreferencePair(*_split_hh(chosen_text, rejected_text))
    if not all(map(str.strip, pair.responses)):
        raise Unusable(_BLANK)
    return pair


def _split_hh(chosen_text: str, rejected_text: str) -> tuple[str, str, str]:
    cut = chosen_text.rfind(ASSISTANT)
    if ASSISTANT not in rejected_text or cut < 0:
        raise Unusable(NO_DIALOGUE)
    if chosen_text[:cut] != rejected_text[: rejected_text.rfind(ASSISTANT)]:
        raise Unusable("chosen and rejected differ before the last '\\n\\nAssistant:'")
    end = cut + len(ASSISTANT)
    return chosen_text[:end], chosen_text[end:], rejected_text[end:]


def pair_of(
    record: dict,
    shape: Shape,
    reading: Reading,
    template: ChatTemplate | None,
    data: DataSection = DEFAULTS,
    drop_identical: bool = True,
    note: Callable[[str], None] = lambda prompt: None,
    index: int = 0,
    file: int = 0,
) -> PreferencePair:
    """The pair of one reading of a record of this shape. note: called with the prompt, also of most pairs
    that are dropped. Raises `Unusable` with the reason for which the pair is dropped, and `BadRecord` for
    messages without a template, or that it refuses."""
    is_hh = reading.form == HH_DIALOGUES
    if is_hh and reading.rejected is None:
        raise BadRecord(f"{shape.at['messages']!r} is no list of messages", "; give one")
    ends_as_hh = isinstance(reading.prompt, str) and reading.prompt.rstrip().endswith(ASSISTANT)
    if data.text == "template" and (is_hh or ends_as_hh):
        right = '; data.text = "template" is for a prompt in text, so leave it out'
        raise BadRecord("HH dialogues, which are text of their own", right)

    def noted(prompt: str) -> None:
        note(prompt)
        if reading.dropped:
            raise Unusable(reading.dropped)

    fields: dict[str, Any] = {"index": index, "margin": reading.margin, "file": file, "label": reading.label}
    others = record.keys() - shape.keys
    fields["unread"] = tuple(key for key in record if key in others and record[key] not in (None, ""))
    if is_hh or (reading.form == PROMPT_AND_RESPONSES and data.text != "template"):
        texts: Any = reading[:3] if not is_hh else _split_hh(*reading[1:3])  # type: ignore[arg-type]
        noted(texts[0])
        pair = PreferencePair(*texts, **fields)
    elif template is None:
        raise BadRecord("messages without a chat template", "; this command reads text")
    else:
        try:
            pair = _pair_of_messages(reading, record, template, noted, fields)
        except RecursionError:
            raise BadRecord("messages are nested too deeply", "; give fewer levels") from None
    if not all(map(str.strip, pair.responses)):
        raise Unusable(_BLANK)
    if drop_identical and pair.chosen == pair.rejected:
        raise Unusable("chosen and rejected are identical")
    if data.min_margin and (reading.margin is None or reading.margin < data.min_margin):
        less = "no margin" if reading.margin is None else f"a margin below {data.min_margin}"
        raise Unusable(f"{less} (data.min_margin)")
    return pair


def _pair_of_messages(
    reading: Reading, record: dict, template: ChatTemplate, note: Callable[[str], None], fields: dict
) -> PreferencePair:
    """fields: what of the pair needs no template."""
    prompt, responses = _turns(reading, template)
    template.check_roles(chain(prompt, *responses))
    if not prompt:
        one = "nothing stands before the assistant's first turn"
        two = "chosen and rejected share no turn, or `prompt` has none"
        raise Unusable(f"no prompt: {one if reading.rejected is None else two}")
    if any(not its or {its[0]["role"], its[-1]["role"]} != {"assistant"} for its in responses):
        raise Unusable("a response does not begin and end with a turn of the assistant")
    own, prompt = prompt, with_system(record, prompt)
    plain = [{"content": None} | message for message in prompt]
    # A prompt in text has the same key as without a template.
    of_text = isinstance(reading.prompt, str) and reading.form == PROMPT_AND_RESPONSES
    note(str(reading.prompt) if of_text else json.dumps(plain, sort_keys=True))
    given = given_of(record)
    text, texts, left_out = template.split(prompt, responses, given)
    others = []
    for response, its_text in zip(responses, texts, strict=True):
        if template.is_blank(prompt, response, its_text, given):
            raise Unusable(_BLANK)
        others.append(others_in_text(template, prompt, response, (text, its_text), given))

    # What of the record did not reach the text.
    read = {"tools", "chat_template_kwargs"} | ({"system"} if prompt is not own else set())
    unread = [key for key in fields["unread"] if key not in read]
    for name, value in given.items():
        if value is not None and not template.reads(name):
            unread.append(name if name == "tools" else f"chat_template_kwargs.{name}")
    written_out = template.kind != "model"
    if written_out:
        keys = {key for message in chain(prompt, *responses) for key in message}
        unread += [f"{key} of messages" for key in keys if not template.reads(key)]

    beside = {key: record[key] for key in ("tools", "chat_template_kwargs") if record.get(key)}
    return PreferencePair(
        text,
        texts[0],
        texts[1] if len(texts) > 1 else None,
        **fields | {"unread": tuple(unread)},
        others=tuple(others) if any(others) else (),
        add_special_tokens=written_out,
        tail="" if template.closes else None,
        messages=True,
        left_out=left_out,
        said=(prompt, responses, beside),
    )


def _turns(reading: Reading, template: ChatTemplate) -> tuple[list[Message], list[list[Message]]]:
    """The prompt and each response as messages. A prompt in text is what the user says, a response what the
    assistant says."""

    def turns(said: Any, role: str) -> list[Message]:
        return said if isinstance(said, list) else [{"role": role, "content": said}]

    responses: list[Any] = [each for each in (reading.chosen, reading.rejected) if each is not None]
    if reading.form != CONVERSATIONS:
        return turns(reading.prompt, "user"), [turns(each, "assistant") for each in responses]
    for name, conversation in zip(("chosen", "rejected"), responses, strict=False):
        if isinstance(conversation, str):
            raise BadRecord(f"{name!r} is no list of messages", "; give one, as under the other keys")
    first, *others = responses
    own = reading.prompt if isinstance(reading.prompt, list) else []
    if own and own[-1].get("content") not in [message.get("content") for message in first]:
        raise Unusable("chosen does not repeat `prompt`, and begins with another turn")
    if others:
        shared = shared_turns(first, others[0], template.reads)
    else:
        shared = [*(message["role"] for message in first), "assistant"].index("assistant")
    return first[:shared], [conversation[shared:] for conversation in responses]


def prompt_of(record: dict, template: ChatTemplate, data: DataSection = DEFAULTS) -> Prompt:
    """The prompt of a record, which needs no responses: a `prompt` in text or messages, or what a record of
    any shape has for its prompt; of a dialogue, all before its last response."""
    record = renamed(record, data.columns)
    record = record | {key: from_json(record, key) for key in as_text(record) if key in ("prompt", "chosen")}
    try:
        reading = shape_of(record, data.columns).readings(record)[0]
    except BadRecord:  # It has a prompt or a dialogue alone, or neither.
        own = None if record.get("prompt") is None else said(record, "prompt")
        reading = Reading(own, said(record, "chosen") if own is None and "chosen" in record else "")
    prompt, chosen, form = reading.prompt, reading.chosen, reading.form
    if form == CONVERSATIONS and isinstance(chosen, list):
        prompt = chosen[:-1] if chosen and chosen[-1]["role"] == "assistant" else None
    elif form == HH_DIALOGUES and isinstance(chosen, str):
        prompt = "".join(chosen.rpartition(ASSISTANT)[:2])
    elif form == MESSAGES or data.text == "template":
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if prompt and isinstance(prompt, str):
        return Prompt(prompt)
    if not (prompt and isinstance(prompt, list)):
        raise BadRecord("no prompt", "; give `prompt` as text or messages, or a dialogue as `chosen`")
    prompt, given = with_system(record, prompt), given_of(record)
    template.check_roles(prompt)
    text = template.render(prompt, True, given)
    if template.kind != "model":
        return Prompt(text, tail=template.tail)
    return Prompt(text, prompt, add_special_tokens=False, tail=template.tail, given=given)
