"""Records to preferences: the four shapes that a record may have, and the prompt and the two responses in it.

    {"chosen": "\\n\\nHuman: ..", "rejected": ..}            HH dialogues, turn after turn in one text
    {"prompt": "..", "chosen": "..", "rejected": ".."}     text
    {"prompt": [..], "chosen": [..], "rejected": [..]}     messages: a prompt, responses of one turn or more
    {"chosen": [..], "rejected": [..]}                     conversations: the prompt is the turns they share

Each may have a `margin`, or a `score_chosen` and a `score_rejected`, and beside messages a `system` turn,
`tools` and `chat_template_kwargs`. Other keys are not read, and the report names them.

A record that cannot be read (broken JSON, a missing key) is an error: the file is not what it is taken for. A
record that reads well but can teach nothing (no shared prompt, a blank response, two equal responses) is
dropped and counted, because published files hold some.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.messages import given_of, messages_of, shared_turns, text_of, with_system
from minidpo.data.pair_tokens import Ranges
from minidpo.data.records import BadRecord, check_characters, number_of, printable, read_records
from minidpo.data.report import DataReport, FileReport, dropped_lines
from minidpo.data.turns import others_in_text
from minidpo.errors import UserError

# The blank line before it belongs to the marker: "Assistant:" anywhere else is something that was said.
ASSISTANT = "\n\nAssistant:"

HH_DIALOGUES = "HH dialogues (chosen, rejected)"
PROMPT_AND_RESPONSES = "prompt, chosen, rejected"
MESSAGES = "prompt, chosen, rejected as messages"
CONVERSATIONS = "whole conversations (chosen, rejected)"

_BLANK = "nothing but blanks in a response"
_READ = {"prompt", "chosen", "rejected", "margin", "score_chosen", "score_rejected"}


class Unusable(ValueError):
    """A record that reads well and can teach nothing. The message is the reason for which it is dropped."""


@dataclass(frozen=True)
class PreferencePair:
    """One prompt and one or two responses to it."""

    prompt: str
    chosen: str
    rejected: str | None  # None: the record has one response
    index: int = field(default=-1, compare=False)  # the record's number in its file, from 0
    margin: float | None = field(default=None, compare=False)  # by how much chosen is better, if it is known
    label: bool | None = None  # of a single response: desirable or not
    others: tuple[Ranges, ...] = ()  # per response: its characters that the assistant did not write
    closed: bool = field(default=False, compare=False)  # whether the responses end as they are, without EOS
    add_special_tokens: bool = True  # false for the text of a chat template that wrote BOS itself
    file: int = field(default=0, compare=False)  # which of several files the record is from
    messages: bool = field(default=False, compare=False)  # whether a template made the prompt of messages
    unread: tuple[str, ...] = field(default=(), compare=False)  # keys of the record
    left_out: str = field(default="", compare=False)  # the end of the generation prompt, see ChatTemplate

    @property
    def responses(self) -> list[str]:
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]


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
    keys = ""  # of the first record
    for number, record in read_records(Path(path)):
        index = file.read
        file.read += 1
        file.unit = "line" if number > index else "record"  # Only the records of a list are numbered from 0.
        try:
            if isinstance(record, BadRecord):
                raise record
            keys = keys or _keys_of(record)
            shape = shape_of(record)
            file.format = file.format or shape
            if shape != file.format:
                raise BadRecord(f"a record of {shape}", f" in a file of {file.format}; keep to one")
            pair = pair_of(record, shape, template, drop_identical, index, file_number, report)
            file.kept += 1
            file.unread.update(pair.unread)
            if pair.left_out:
                file.left_out[pair.left_out] += 1
            yield pair
        except BadRecord as bad:
            if not skip_bad:
                where = f"{path}:{number}" if file.unit == "line" else f"{path}: record {number}"
                raise UserError(f"{where}: {bad}") from None
            file.dropped[bad.kind].append(number)
        except Unusable as reason:
            file.dropped[str(reason)].append(number)
    if not file.kept:
        reasons = ", ".join(dropped_lines(file.dropped, file.unit)) or "the file is empty"
        what = f"{path}: no usable pair in {file.read} records ({reasons})"
        raise UserError(f"{what}; one at least is needed{keys}")


def split_hh(chosen_text: str, rejected_text: str) -> PreferencePair:
    """Split two HH dialogues into their prompt and responses, each at its own last "\\n\\nAssistant:".

    The prompt ends with that marker and the responses keep their leading space, so that prompt + response is
    the text as it was published. Whatever follows the marker is text, "Human:" included. Raises `ValueError`
    if a dialogue has no such turn, if the two do not share the whole prompt, or if a response is blank.
    Cutting at the longest common prefix would never fail, and be wrong: two responses that begin alike would
    leave half a word in the prompt.
    """
    pair = _split_hh(chosen_text, rejected_text)
    _check_blank(pair)
    return pair


def _split_hh(chosen_text: str, rejected_text: str) -> PreferencePair:
    cut = chosen_text.rfind(ASSISTANT)
    if ASSISTANT not in rejected_text or cut < 0:
        raise Unusable("no '\\n\\nAssistant:' in a dialogue")
    if chosen_text[:cut] != rejected_text[: rejected_text.rfind(ASSISTANT)]:
        raise Unusable("chosen and rejected differ before the last '\\n\\nAssistant:'")
    end = cut + len(ASSISTANT)
    return PreferencePair(chosen_text[:end], chosen_text[end:], rejected_text[end:])


def shape_of(record: dict) -> str:
    """The shape of one record. Raises `BadRecord` for a missing key and for a value of another kind."""
    for key in ("chosen", "rejected"):
        if key not in record:
            raise BadRecord(f"no key {key!r}", _keys_of(record))
    if isinstance(record.get("prompt"), list):
        for key in ("prompt", "chosen", "rejected"):
            messages_of(record, key)
        return MESSAGES
    if isinstance(record["chosen"], list):  # A prompt beside them, a string, repeats the first turn.
        for key in ("chosen", "rejected"):
            messages_of(record, key)
        return CONVERSATIONS
    for key in ("prompt", "chosen", "rejected"):
        text = record.get(key, "")
        if not isinstance(text, str):
            raise BadRecord(f"{key!r} is of type {type(text).__name__}", "; give a string")
        check_characters(text, repr(key))
    return PROMPT_AND_RESPONSES if "prompt" in record else HH_DIALOGUES


def pair_of(
    record: dict,
    shape: str,
    template: ChatTemplate | None,
    drop_identical: bool,
    index: int = 0,
    file: int = 0,
    report: DataReport | None = None,
) -> PreferencePair:
    """The pair of a record of this shape. Raises `Unusable` with the reason for which the record is dropped,
    and `BadRecord` for messages without a template, or that it refuses. report: notes the prompt before."""
    report = report or DataReport()
    if shape == HH_DIALOGUES:
        pair = _split_hh(record["chosen"], record["rejected"])
    elif shape == PROMPT_AND_RESPONSES:
        pair = PreferencePair(record["prompt"], record["chosen"], record["rejected"])
    elif template is None:
        raise BadRecord("messages without a chat template", "; this command reads text")
    else:
        try:
            pair = _pair_of_messages(record, shape, template, index, file, report)
        except RecursionError:
            raise BadRecord("messages are nested too deeply", "; give fewer levels") from None
    if not pair.messages:
        report.add_prompt(pair.prompt, index, file)
    _check_blank(pair)
    if drop_identical and pair.chosen == pair.rejected:
        raise Unusable("chosen and rejected are identical")
    unread = pair.unread if pair.messages else _unread(record)
    return replace(pair, margin=_margin(record), unread=unread, index=index, file=file)


def _pair_of_messages(
    record: dict, shape: str, template: ChatTemplate, index: int, file: int, report: DataReport
) -> PreferencePair:
    chosen, rejected = messages_of(record, "chosen"), messages_of(record, "rejected")
    if shape == MESSAGES:
        prompt = messages_of(record, "prompt")
    else:
        shared = shared_turns(chosen, rejected, template.reads)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise Unusable("no prompt: chosen and rejected share no turn, or `prompt` has none")
    responses = [chosen, rejected]
    if any(not its or {its[0]["role"], its[-1]["role"]} != {"assistant"} for its in responses):
        raise Unusable("a response does not begin and end with a turn of the assistant")
    own, prompt = prompt, with_system(record, prompt)
    plain = [message | {"content": text_of(message)} for message in prompt]
    report.add_prompt(json.dumps(plain, sort_keys=True), index, file)
    given = given_of(record)
    text, texts, left_out = template.split(prompt, responses, given)
    others = []
    for response, its_text in zip(responses, texts, strict=True):
        if template.is_blank(prompt, response, its_text, given):
            raise Unusable(_BLANK)
        others.append(others_in_text(template, prompt, response, (text, its_text), given))

    # What of the record did not reach the text.
    read = {"tools", "chat_template_kwargs"} | ({"system"} if prompt is not own else set())
    unread = [key for key in _unread(record) if key not in read]
    for name, value in given.items():
        if value is not None and not template.reads(name):
            unread.append(name if name == "tools" else f"chat_template_kwargs.{name}")
    written_out = template.kind != "model"
    if written_out:
        keys = {key for message in chain(prompt, *responses) for key in message}
        unread += [f"{key} of messages" for key in keys if not template.reads(key)]

    return PreferencePair(
        text,
        texts[0],
        texts[1],
        others=tuple(others) if any(others) else (),
        add_special_tokens=written_out,
        closed=template.closes,
        messages=True,
        unread=tuple(unread),
        left_out=left_out,
    )


def _unread(record: dict) -> tuple[str, ...]:
    """The keys of a record that hold something and are not read."""
    if record.keys() <= _READ:
        return ()
    return tuple(key for key, value in record.items() if key not in _READ and value not in (None, ""))


def _keys_of(record: dict) -> str:
    """The keys that a record has and those that it should have, for the end of an error message."""
    names = ", ".join(map(printable, record)) or "none"
    names = names if len(names) <= 200 else names[:200] + " ..."
    return f"; its keys are {names}; give chosen, rejected, and prompt unless they hold it"


def _check_blank(pair: PreferencePair) -> None:
    if not all(text.strip() for text in pair.responses):
        raise Unusable(_BLANK)


def _margin(record: dict) -> float | None:
    keys = ("margin", "score_chosen", "score_rejected")
    margin, chosen, rejected = (number_of(record.get(key)) for key in keys)
    if margin is None and chosen is not None and rejected is not None:
        return chosen - rejected
    return margin
