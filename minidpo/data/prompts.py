"""The prompt of a record, of which a response is sampled."""

from typing import NamedTuple

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.messages import Given, Message, given_of, messages_of, with_system
from minidpo.data.preferences import ASSISTANT, PreferencePair
from minidpo.data.records import BadRecord, check_characters


class Prompt(NamedTuple):
    """What a response is sampled for."""

    text: str
    messages: list[Message] | None = None  # those of which the model's own template (not hh, chatml) made it
    add_special_tokens: bool = True
    tail: str | None = None  # what a reward model reads after a response, see ChatTemplate; None: EOS
    given: Given = {}  # to the template beside the messages
    index: int = 0  # type: ignore[assignment]  # the record's number in its file, from 0


def prompt_of(record: dict, template: ChatTemplate) -> Prompt:
    """The prompt of a record, which needs no responses: a `prompt` in text or messages, or what stands in
    `chosen` before its last response. Raises `BadRecord` if there is none."""
    prompt, chosen = record.get("prompt"), record.get("chosen")
    if isinstance(prompt, list):
        prompt = messages_of(record, "prompt")
    elif isinstance(chosen, list):  # conversations, whatever `prompt` says
        chosen = messages_of(record, "chosen")
        prompt = chosen[:-1] if chosen and chosen[-1]["role"] == "assistant" else None
    elif prompt is None and isinstance(chosen, str):
        prompt = "".join(chosen.rpartition(ASSISTANT)[:2])
    if prompt and isinstance(prompt, str):
        check_characters(prompt, "'prompt'")
        return Prompt(prompt)
    if not (prompt and isinstance(prompt, list)):
        raise BadRecord("no prompt", "; give `prompt` as text or messages, or a dialogue as `chosen`")
    prompt, given = with_system(record, prompt), given_of(record)
    text = template.render(prompt, True, given)
    if template.kind != "model":
        return Prompt(text, tail=template.tail)
    return Prompt(text, prompt, add_special_tokens=False, tail=template.tail, given=given)


def prompt_of_pair(pair: PreferencePair) -> Prompt:
    # The tail is in the responses already.
    tail = "" if pair.closed else None
    return Prompt(pair.prompt, add_special_tokens=pair.add_special_tokens, tail=tail)
