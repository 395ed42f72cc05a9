"""One record of a preference file: which of the known shapes it has, and the prompt and endings in it.

    {"chosen": "\\n\\nHuman: ..", "rejected": ..}            HH dialogues, turn after turn in one text
    {"prompt": "..", "chosen": "..", "rejected": ".."}     text
    {"prompt": [..], "chosen": [..], "rejected": [..]}     messages: the prompt, and one assistant turn for each ending
    {"chosen": [..], "rejected": [..]}                     conversations: the prompt is the turns they share

Each may have a `margin`, or a `score_chosen` and a `score_rejected`; other keys are not looked at.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minidpo.chat import ChatTemplate, Message, TemplateError
from minidpo.errors import one_line

# With the blank line before it: "Assistant:" anywhere else is something that was said, not a turn.
ASSISTANT = "\n\nAssistant:"

HH_DIALOGUES = "HH dialogues (chosen, rejected)"
PROMPT_AND_ENDINGS = "prompt, chosen, rejected"
MESSAGES = "prompt, chosen, rejected as messages"
CONVERSATIONS = "whole conversations (chosen, rejected)"

NO_TURN = "no '\\n\\nAssistant:' in a dialogue"
DIFFERENT_PROMPTS = "chosen and rejected differ before the last '\\n\\nAssistant:'"
EMPTY_ENDING = "nothing but blanks in an ending"
IDENTICAL = "chosen and rejected are identical"
NO_PROMPT = "no message to answer: chosen and rejected share no turn, or the prompt has none"
NOT_ONE_TURN = "an ending is not one assistant turn"

_OTHER_TEMPLATE = "; mend the record, or write messages as template = 'hh' or 'chatml'"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell what UTF-8, and a tokenizer, cannot


class BadRecord(ValueError):
    """A record that cannot be read. `kind` names what is wrong with it and is equal for all that fail alike, so
    that they can be counted; the whole message goes on with where, and what would be right."""

    def __init__(self, kind: str, rest: str) -> None:
        super().__init__(kind + rest)
        self.kind = kind


class Unusable(ValueError):
    """A record that reads well and can teach nothing: its message is the reason for which it is dropped."""


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, two endings.

    index: the record's place in its file, from 0, blank lines not counted. margin: by how much chosen is
    better, None where the record does not say. add_special_tokens: false for the text of a chat template that
    wrote BOS itself. file: which of several files, from 0.
    """

    prompt: str
    chosen: str
    rejected: str
    index: int = field(default=-1, compare=False)
    margin: float | None = field(default=None, compare=False)
    add_special_tokens: bool = True
    file: int = field(default=0, compare=False)


class Prompt(NamedTuple):
    """What is to be answered. add_special_tokens: as above.

    messages: those that the model's own template made the text of; hh and chatml write plain text, which stands for itself.
    """

    text: str
    messages: list[Message] | None = None
    add_special_tokens: bool = True

    @classmethod
    def of_messages(cls, messages: list[Message], template: ChatTemplate) -> "Prompt":
        """Raises `BadRecord` where the template refuses them."""
        try:
            text = template.render(messages, generation_prompt=True)
        except TemplateError as error:
            raise BadRecord(one_line(error), _OTHER_TEMPLATE) from None
        _check_characters(text, "the text of the messages")
        return cls(text, messages if template.kind == "model" else None, not template.writes_special_tokens)


def prompt_of(record: dict, template: ChatTemplate) -> Prompt:
    """The prompt of a record, which needs no endings: a `prompt` in text or messages, or what stands in `chosen` before
    its last answer. Raises `BadRecord` where there is none.
    """
    prompt, chosen = record.get("prompt"), record.get("chosen")
    if prompt is None and isinstance(chosen, str):
        before, turn, _ = chosen.rpartition(ASSISTANT)
        prompt = before + turn
    if isinstance(chosen, list) and not isinstance(
        prompt, list
    ):  # as in CONVERSATIONS, whatever the prompt says
        _check_messages(record, "chosen")
        prompt = chosen[:-1] if chosen and chosen[-1]["role"] == "assistant" else []
    if not (prompt and isinstance(prompt, str | list)):
        raise BadRecord("no prompt", "; give `prompt` as text or messages, or a dialogue as `chosen`")
    if isinstance(prompt, list):
        _check_messages({"prompt": prompt}, "prompt")
        return Prompt.of_messages(prompt, template)
    _check_characters(prompt, "'prompt'")
    return Prompt(prompt)


def split_hh(chosen_text: str, rejected_text: str) -> PreferencePair:
    """Split two HH dialogues into their prompt and endings, each on its own last "\\n\\nAssistant:".

    The prompt ends with that marker and the endings keep their leading space, so that prompt + ending is
    the text as it was published. Whatever follows the marker is text, "Human:" included.
    Raises `ValueError` where a dialogue has no such turn, where the two do not share the whole prompt, or
    where an ending is blank. Cutting at the longest common prefix would never fail, and be wrong: two
    replies that begin alike would leave half a word in the prompt.
    """
    chosen_cut, rejected_cut = chosen_text.rfind(ASSISTANT), rejected_text.rfind(ASSISTANT)
    if chosen_cut < 0 or rejected_cut < 0:
        raise Unusable(NO_TURN)
    if chosen_text[:chosen_cut] != rejected_text[:rejected_cut]:
        raise Unusable(DIFFERENT_PROMPTS)
    end = chosen_cut + len(ASSISTANT)
    pair = PreferencePair(chosen_text[:end], chosen_text[end:], rejected_text[end:])
    if not (pair.chosen.strip() and pair.rejected.strip()):
        raise Unusable(EMPTY_ENDING)
    return pair


def shape_of(record: dict) -> str:
    """The shape of one record. Raises `BadRecord` for a missing key and for a value of another kind."""
    for key in ("chosen", "rejected"):
        if key not in record:
            raise BadRecord(
                f"no key {key!r}", "; a record has chosen, rejected, and prompt unless they hold it"
            )
    if isinstance(record.get("prompt"), list):
        _check_messages(record, "prompt", "chosen", "rejected")
        return MESSAGES
    if isinstance(record["chosen"], list):
        _check_messages(
            record, "chosen", "rejected"
        )  # a prompt beside them, a string, says the first turn again
        return CONVERSATIONS
    for key in ("prompt", "chosen", "rejected") if "prompt" in record else ("chosen", "rejected"):
        if not isinstance(record[key], str):
            raise BadRecord(f"{key!r} is of type {type(record[key]).__name__}", "; give a string")
        _check_characters(record[key], repr(key))
    return PROMPT_AND_ENDINGS if "prompt" in record else HH_DIALOGUES


def pair_of(
    record: dict, shape: str, template: ChatTemplate | None, drop_identical: bool
) -> tuple[str, str, str, bool]:
    """Prompt, chosen, rejected, and whether special tokens are still to be added. `shape` is the record's.

    Raises `Unusable` with the reason for which the record is dropped, and `BadRecord` where messages are met
    without a template or refused by it.
    """
    if shape in (MESSAGES, CONVERSATIONS):
        return _from_messages(record, shape, template, drop_identical)
    prompt, chosen, rejected = record.get("prompt", ""), record["chosen"], record["rejected"]
    if shape == HH_DIALOGUES:
        pair = split_hh(chosen, rejected)
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    _check_endings(chosen, rejected, drop_identical)
    return prompt, chosen, rejected, True


def margin_of(record: dict) -> float | None:
    """`margin`, or `score_chosen` - `score_rejected`; None unless they are finite numbers."""
    margin = _number(record.get("margin"))
    chosen, rejected = _number(record.get("score_chosen")), _number(record.get("score_rejected"))
    if margin is None and chosen is not None and rejected is not None:
        return chosen - rejected
    return margin


def _from_messages(
    record: dict, shape: str, template: ChatTemplate | None, drop_identical: bool
) -> tuple[str, str, str, bool]:
    prompt, chosen, rejected = (
        record["prompt"] if shape == MESSAGES else [],
        record["chosen"],
        record["rejected"],
    )
    if shape == CONVERSATIONS:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and _same(chosen[shared], rejected[shared]):
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise Unusable(NO_PROMPT)
    if any(len(ending) != 1 or ending[0]["role"] != "assistant" for ending in (chosen, rejected)):
        raise Unusable(NOT_ONE_TURN)
    _check_endings(chosen[0]["content"], rejected[0]["content"], drop_identical)
    if template is None:
        raise BadRecord("messages without a chat template", "; this command reads text")
    try:
        text, endings = template.split(prompt, [chosen[0], rejected[0]])
    except TemplateError as error:
        raise BadRecord(one_line(error), _OTHER_TEMPLATE) from None
    for written in (text, *endings):  # a template may write more of a message than role and content
        _check_characters(written, "the text of the messages")
    return text, endings[0], endings[1], not template.writes_special_tokens


def _same(left: Message, right: Message) -> bool:
    return (left["role"], left["content"]) == (right["role"], right["content"])


def _check_endings(chosen: str, rejected: str, drop_identical: bool) -> None:
    if not (chosen.strip() and rejected.strip()):
        raise Unusable(EMPTY_ENDING)
    if drop_identical and chosen == rejected:
        raise Unusable(IDENTICAL)


def _check_messages(record: dict, *keys: str) -> None:
    for key in keys:
        if not isinstance(record[key], list):
            kind = type(record[key]).__name__
            raise BadRecord(f"{key!r} is of type {kind} beside messages", "; give a list of messages")
        for place, message in enumerate(record[key]):
            for name in ("role", "content"):
                if not (isinstance(message, dict) and isinstance(message.get(name), str)):
                    raise BadRecord(
                        f"a message in {key!r} has no text under {name!r}",
                        f" (number {place} from 0); a message is {{'role': 'user', 'content': '...'}}",
                    )
                _check_characters(message[name], f"{name!r} of a message in {key!r}")


def _check_characters(text: str, name: str) -> None:
    if _LONE_SURROGATE.search(text):
        raise BadRecord(f"{name} has half a surrogate pair", " (\\ud800 to \\udfff); give whole characters")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of 400 digits
        return None
