"""Records to preferences: the four shapes that a record may have, and the prompt and the two responses in it.

    {"chosen": "\\n\\nHuman: ..", "rejected": ..}            HH dialogues, turn after turn in one text
    {"prompt": "..", "chosen": "..", "rejected": ".."}     text
    {"prompt": [..], "chosen": [..], "rejected": [..]}     messages: a prompt, one assistant turn per response
    {"chosen": [..], "rejected": [..]}                     conversations: the prompt is the turns they share

Each may have a `margin`, or a `score_chosen` and a `score_rejected`; other keys are not read.

A record that cannot be read (broken JSON, a missing key) is an error: the file is not what it is taken for. A
record that reads well but can teach nothing (no shared prompt, a blank response, two equal responses) is
dropped and counted, because published files hold some.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from minidpo.data.chat_template import ChatTemplate, Message
from minidpo.data.records import BadRecord, check_characters, read_records
from minidpo.data.report import DataReport, FileReport, dropped_lines
from minidpo.errors import UserError

# The blank line before it belongs to the marker: "Assistant:" anywhere else is something that was said.
ASSISTANT = "\n\nAssistant:"

HH_DIALOGUES = "HH dialogues (chosen, rejected)"
PROMPT_AND_RESPONSES = "prompt, chosen, rejected"
MESSAGES = "prompt, chosen, rejected as messages"
CONVERSATIONS = "whole conversations (chosen, rejected)"


class Unusable(ValueError):
    """A record that reads well and can teach nothing. The message is the reason for which it is dropped."""


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and two responses to it."""

    prompt: str
    chosen: str
    rejected: str
    index: int = field(default=-1, compare=False)  # the record's number in its file, from 0
    margin: float | None = field(default=None, compare=False)  # by how much chosen is better, if it is known
    add_special_tokens: bool = True  # false for the text of a chat template that wrote BOS itself
    file: int = field(default=0, compare=False)  # which of several files the record is from


class Prompt(NamedTuple):
    """What a response is sampled for."""

    text: str
    messages: list[Message] | None = None  # those of which the model's own template (not hh, chatml) made it
    add_special_tokens: bool = True


def read_preferences(
    path: str | Path,
    report: DataReport | None = None,
    drop_identical: bool = True,
    template: ChatTemplate | None = None,
    skip_bad: bool = False,
) -> Iterator[PreferencePair]:
    """Yield the usable pairs of one file, in file order. All its records have the shape of the first one.

    report: what is dropped, why and on which lines is added to it. drop_identical: false keeps pairs whose
    responses are equal. template: writes out messages. skip_bad: drop and count records that cannot be read
    as well. Raises `UserError` for a file or record that cannot be read, when it gets there, and at the end
    of a file without a usable pair.
    """
    report = DataReport() if report is None else report
    file, file_number = FileReport(str(path)), len(report.files)
    report.files.append(file)
    for number, record in read_records(Path(path)):
        index = file.read
        file.read += 1
        file.unit = "line" if number > index else "record"  # Only the records of a list are numbered from 0.
        try:
            if isinstance(record, BadRecord):
                raise record
            shape = shape_of(record)
            file.format = file.format or shape
            if shape != file.format:
                raise BadRecord(f"a record of {shape}", f" in a file of {file.format}; keep to one")
            pair = pair_of(record, shape, template, drop_identical)
            file.kept += 1
            yield replace(pair, index=index, file=file_number)
        except BadRecord as bad:
            if not skip_bad:
                where = f"{path}:{number}" if file.unit == "line" else f"{path}: record {number}"
                raise UserError(f"{where}: {bad}") from None
            file.dropped[bad.kind].append(number)
        except Unusable as reason:
            file.dropped[str(reason)].append(number)
    if not file.kept:
        reasons = ", ".join(dropped_lines(file.dropped, file.unit)) or "the file is empty"
        raise UserError(f"{path}: no usable pair in {file.read} records ({reasons}); one at least is needed")


def split_hh(chosen_text: str, rejected_text: str) -> PreferencePair:
    """Split two HH dialogues into their prompt and responses, each at its own last "\\n\\nAssistant:".

    The prompt ends with that marker and the responses keep their leading space, so that prompt + response is
    the text as it was published. Whatever follows the marker is text, "Human:" included. Raises `ValueError`
    if a dialogue has no such turn, if the two do not share the whole prompt, or if a response is blank.
    Cutting at the longest common prefix would never fail, and be wrong: two responses that begin alike would
    leave half a word in the prompt.
    """
    cut = chosen_text.rfind(ASSISTANT)
    if ASSISTANT not in rejected_text or cut < 0:
        raise Unusable("no '\\n\\nAssistant:' in a dialogue")
    if chosen_text[:cut] != rejected_text[: rejected_text.rfind(ASSISTANT)]:
        raise Unusable("chosen and rejected differ before the last '\\n\\nAssistant:'")
    end = cut + len(ASSISTANT)
    _check_blank(chosen_text[end:], rejected_text[end:])
    return PreferencePair(chosen_text[:end], chosen_text[end:], rejected_text[end:])


def prompt_of(record: dict, template: ChatTemplate) -> Prompt:
    """The prompt of a record, which needs no responses: a `prompt` in text or messages, or what stands in
    `chosen` before its last response. Raises `BadRecord` if there is none."""
    prompt, chosen = record.get("prompt"), record.get("chosen")
    if isinstance(chosen, list) and not isinstance(prompt, list):  # conversations, whatever `prompt` says
        _check_messages(record, "chosen")
        prompt = chosen[:-1] if chosen and chosen[-1]["role"] == "assistant" else None
    elif prompt is None and isinstance(chosen, str):
        prompt = "".join(chosen.rpartition(ASSISTANT)[:2])
    if prompt and isinstance(prompt, str):
        check_characters(prompt, "'prompt'")
        return Prompt(prompt)
    if not (prompt and isinstance(prompt, list)):
        raise BadRecord("no prompt", "; give `prompt` as text or messages, or a dialogue as `chosen`")
    _check_messages({"prompt": prompt}, "prompt")
    text = template.render(prompt, generation_prompt=True)
    written_out = template.kind in ("hh", "chatml")
    return Prompt(text, None if written_out else prompt, add_special_tokens=written_out)


def shape_of(record: dict) -> str:
    """The shape of one record. Raises `BadRecord` for a missing key and for a value of another kind."""
    for key in ("chosen", "rejected"):
        if key not in record:
            raise BadRecord(f"no key {key!r}", "; give chosen, rejected, and prompt unless they hold it")
    if isinstance(record.get("prompt"), list):
        _check_messages(record, "prompt", "chosen", "rejected")
        return MESSAGES
    if isinstance(record["chosen"], list):  # A prompt beside them, a string, repeats the first turn.
        _check_messages(record, "chosen", "rejected")
        return CONVERSATIONS
    for key in ("prompt", "chosen", "rejected"):
        text = record.get(key, "")
        if not isinstance(text, str):
            raise BadRecord(f"{key!r} is of type {type(text).__name__}", "; give a string")
        check_characters(text, repr(key))
    return PROMPT_AND_RESPONSES if "prompt" in record else HH_DIALOGUES


def pair_of(record: dict, shape: str, template: ChatTemplate | None, drop_identical: bool) -> PreferencePair:
    """The pair of a record of this shape. Raises `Unusable` with the reason for which the record is dropped,
    and `BadRecord` for messages without a template, or that it refuses."""
    if shape == HH_DIALOGUES:
        pair = split_hh(record["chosen"], record["rejected"])
    elif shape == PROMPT_AND_RESPONSES:
        pair = PreferencePair(record["prompt"], record["chosen"], record["rejected"])
    else:
        pair = _pair_of_messages(record, shape, template)
    _check_blank(pair.chosen, pair.rejected)
    if drop_identical and pair.chosen == pair.rejected:
        raise Unusable("chosen and rejected are identical")
    return replace(pair, margin=_margin(record))


def _pair_of_messages(record: dict, shape: str, template: ChatTemplate | None) -> PreferencePair:
    prompt, chosen, rejected = record.get("prompt"), record["chosen"], record["rejected"]
    if shape == CONVERSATIONS:
        both = zip(chosen[:-1], rejected[:-1], strict=False)
        alike = [(a["role"], a["content"]) == (b["role"], b["content"]) for a, b in both]
        shared = [*alike, False].index(False)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise Unusable("no prompt: chosen and rejected share no turn, or `prompt` has none")
    if any(len(response) != 1 or response[0]["role"] != "assistant" for response in (chosen, rejected)):
        raise Unusable("a response is not one assistant turn")
    # Before the template has written anything around them, which would hide that they are blank.
    _check_blank(chosen[0]["content"], rejected[0]["content"])
    if template is None:
        raise BadRecord("messages without a chat template", "; this command reads text")
    text, (chosen, rejected) = template.split(prompt, [chosen[0], rejected[0]])
    return PreferencePair(text, chosen, rejected, add_special_tokens=template.kind in ("hh", "chatml"))


def _check_blank(chosen: str, rejected: str) -> None:
    if not (chosen.strip() and rejected.strip()):
        raise Unusable("nothing but blanks in a response")


def _margin(record: dict) -> float | None:
    numbers = {}
    for key in ("margin", "score_chosen", "score_rejected"):
        value: Any = record.get(key)
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:  # NaN compares false.
            numbers[key] = float(value)
    if "score_chosen" in numbers and "score_rejected" in numbers:
        numbers.setdefault("margin", numbers["score_chosen"] - numbers["score_rejected"])
    return numbers.get("margin")


def _check_messages(record: dict, *keys: str) -> None:
    for key in keys:
        if not isinstance(record[key], list):
            raise BadRecord(f"{key!r} is no list of messages", "; give one, as under the other keys")
        for message in record[key]:
            for name in ("role", "content"):
                if not (isinstance(message, dict) and isinstance(message.get(name), str)):
                    right = "; a message is {'role': 'user', 'content': '...'}"
                    raise BadRecord(f"a message in {key!r} has no text under {name!r}", right)
                check_characters(message[name], f"{name!r} of a message in {key!r}")
