"""The prompt of a record, of which a response is sampled."""

from typing import NamedTuple

from minidpo.data.bad_record import BadRecord
from minidpo.data.chat_template import ChatTemplate
from minidpo.data.messages import Given, Message, as_text, from_json, given_of, with_system
from minidpo.data.preferences import ASSISTANT, DEFAULTS, PreferencePair
from minidpo.data.readings import CONVERSATIONS, HH_DIALOGUES, MESSAGES, Reading, form_of, said
from minidpo.data.shapes import renamed, shape_of
from minidpo.sections import DataSection


class Prompt(NamedTuple):
    """What a response is sampled for."""

    text: str
    messages: list[Message] | None = None  # those of which the model's own template (not hh, chatml) made it
    add_special_tokens: bool = True
    tail: str | None = None  # what a reward model reads after a response, see ChatTemplate; None: EOS
    given: Given = {}  # to the template beside the messages
    index: int = 0  # type: ignore[assignment]  # the record's number in its file, from 0


def prompt_of(record: dict, template: ChatTemplate, data: DataSection = DEFAULTS) -> Prompt:
    """The prompt of a record, which needs no responses: a `prompt` in text or messages, or what a record of
    any shape has for its prompt; of a dialogue, all before its last response."""
    record = renamed(record, data.columns)
    in_text = [key for key in as_text(record) if key in ("prompt", "chosen")]
    record = record | {key: from_json(record, key) for key in in_text}
    if record.get("prompt") is not None:  # Whether it has responses, and what else, is of no interest.
        conversation = isinstance(record.get("chosen"), list)
        reading = Reading(said(record, "prompt"), said(record, "chosen") if conversation else "")
    else:
        try:
            reading = shape_of(record, data.columns).readings(record)[0]
        except BadRecord:  # It has one dialogue alone, or none.
            reading = Reading(None, "" if record.get("chosen") is None else said(record, "chosen"))
    prompt, chosen, form = reading.prompt, reading.chosen, form_of(reading)
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


def prompt_of_pair(pair: PreferencePair) -> Prompt:
    tail = "" if pair.closed else None  # It is in the responses already.
    return Prompt(pair.prompt, add_special_tokens=pair.add_special_tokens, tail=tail)
