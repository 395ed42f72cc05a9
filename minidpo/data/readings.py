"""What records say: a prompt with two responses, or with one, each text or messages.

One function per way in which preferences are published. Each takes a record, `at`, which says what stands
under which key, and `every`: whether a record of several answers gives all their pairs, or the best answer
against the worst. Each returns at least one reading, and raises `BadRecord` for a value of another kind.
"""

import math
from collections.abc import Callable, Mapping
from itertools import combinations, product
from typing import Any, NamedTuple

from minidpo.data.bad_record import BadRecord, check_characters, printable
from minidpo.data.messages import Message, message_of

Said = str | list[Message]
At = Mapping[str, str]

TIE = "no answer is better than the other"

# The forms that a reading has, see preferences.py
HH_DIALOGUES = "HH dialogues (chosen, rejected)"
PROMPT_AND_RESPONSES = "prompt, chosen, rejected"
MESSAGES = "prompt, chosen, rejected as messages"
CONVERSATIONS = "whole conversations (chosen, rejected)"


class Reading(NamedTuple):
    """A prompt and its responses, as a record has them."""

    prompt: Said | None  # None: chosen and rejected are whole dialogues, which begin with it
    chosen: Said
    rejected: Said | None = None  # None: the record has one response
    margin: float | None = None  # by how much chosen is better
    label: bool | None = None  # of a single response: desirable or not
    dropped: str = ""  # why it can teach nothing

    @property
    def form(self) -> str:
        """Which of the four it has."""
        prompt, chosen, rejected = self[:3]
        if isinstance(chosen, str) and not isinstance(rejected, list) and not isinstance(prompt, list):
            return HH_DIALOGUES if prompt is None else PROMPT_AND_RESPONSES
        turns = [each[0]["role"] for each in (chosen, rejected) if isinstance(each, list) and each]
        # A prompt beside whole conversations repeats how they begin.
        whole = prompt is None or (bool(turns) and {"system", "user"}.issuperset(turns))
        return CONVERSATIONS if whole else MESSAGES


def of_pair(record: dict, at: At, every: bool) -> list[Reading]:
    """A chosen and a rejected response, or lists of texts, in which no order is known."""
    prompt, margin = _prompt(record, at), _margin(record)
    both = record["chosen"], record["rejected"]
    if not any(isinstance(value, list) for value in both):  # most records
        return [Reading(prompt, said(record, "chosen"), said(record, "rejected"), margin)]
    # A list of texts is several responses; one of messages is one.
    lists = [value if isinstance(value, list) and {*map(type, value)} == {str} else [value] for value in both]
    every_pair = ({"chosen": better, "rejected": worse} for better, worse in product(*lists))
    pairs = [Reading(prompt, said(pair, "chosen"), said(pair, "rejected"), margin) for pair in every_pair]
    return pairs if every else pairs[:1]


def of_preference(record: dict, at: At, every: bool) -> list[Reading]:
    """Two answers and a number: below 0 the first one is better, above 0 the second, by so much."""
    strength = _number(record, at["margin"])
    better, worse = ("first", "second") if strength < 0 else ("second", "first")
    responses = said(record, at[better]), said(record, at[worse])
    return [Reading(_prompt(record, at), *responses, abs(strength), dropped="" if strength else TIE)]


def of_vote(record: dict, at: At, every: bool) -> list[Reading]:
    """Two answers, A and B, perhaps with scores, and 1 if A is the better one, else 0."""
    better, worse = ("A", "B") if _truth(record, at["A is better"]) else ("B", "A")
    high, low = (number_of(record.get(at[f"score of {name}"])) for name in (better, worse))
    margin = None if high is None or low is None else high - low
    return [Reading(_prompt(record, at), said(record, at[better]), said(record, at[worse]), margin)]


def of_answers(text: str, worth: str) -> Callable[[dict, At, bool], list[Reading]]:
    """Answers, each with a `text` and its `worth`: a rank, of which 1 is the best, or a score."""

    def read(record: dict, at: At, every: bool) -> list[Reading]:
        prompt, answers, key = _prompt(record, at), record[at["answers"]], at["answers"]
        if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
            raise BadRecord(f"{key!r} is no list of objects", "; give one object per answer")
        by_worth = []
        for answer in answers:
            if answer.get(text) is None:
                raise BadRecord(f"an answer in {key!r} has no {text!r}", "; give each its text")
            number = _number(answer, worth)
            by_worth.append((-number if worth == "rank" else number, said(answer, text)))
        if len(by_worth) < 2:
            return [Reading(prompt, "", "", dropped="fewer than two answers")]
        by_worth.sort(key=lambda answer: answer[0], reverse=True)  # Equal ones stay in their order.
        pairs = combinations(by_worth, 2) if every else [(by_worth[0], by_worth[-1])]
        return [
            Reading(prompt, better, worse, high - low, dropped="" if high > low else TIE)
            for (high, better), (low, worse) in pairs
        ]

    return read


def of_one(record: dict, at: At, every: bool) -> list[Reading]:
    """One response to a prompt, or one conversation, and perhaps a label."""
    response = next(at[name] for name in ("completion", "chosen", "messages") if name in at)
    if "chosen" in at and record.get("rejected") is not None:
        raise BadRecord("'rejected' in a file whose first record has none", "; a file keeps to one kind")
    label = _truth(record, at["label"]) if "label" in at else None
    return [Reading(_prompt(record, at), said(record, response), label=label)]


def said(record: dict, key: str) -> Said:
    """The text or the messages under a key. A message alone is one of a list."""
    value = record[key]
    if isinstance(value, str):
        if not value.isascii():  # Most texts are, and this is known without looking.
            check_characters(value, repr(key))
        return value
    if isinstance(value, dict | list):
        return [message_of(message, key) for message in ([value] if isinstance(value, dict) else value)]
    raise BadRecord(f"{key!r} is of type {type(value).__name__}", "; give a string")


def _prompt(record: dict, at: At) -> Said | None:
    if record.get(at.get("prompt")) is None:
        return None
    prompt, key = said(record, at["prompt"]), at.get("input")
    more = "" if key is None or record.get(key) is None else said(record, key)
    if isinstance(prompt, str) and isinstance(more, str) and more.strip():
        return f"{prompt}\n{more}"
    return prompt


def _margin(record: dict) -> float | None:
    """`margin`, else the difference of two scores; None if they are no numbers."""
    keys = ("margin", "score_chosen", "score_rejected")
    if record.keys().isdisjoint(keys):
        return None
    margin, high, low = (number_of(record.get(key)) for key in keys)
    return high - low if margin is None and high is not None and low is not None else margin


def number_of(value: Any) -> float | None:
    """A value of a record as a number, also where a .csv file has it as text; None for any other."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _number(record: dict, key: str) -> float:
    number = number_of(record.get(key))
    if number is None:
        raise BadRecord(f"{key!r} is no number", f" ({printable(repr(record.get(key)))[:40]}); give one")
    return number


def _truth(record: dict, key: str) -> bool:
    """true or false, or 1 or 0; as text too, in which a .csv file has them."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    truth = words.get(str(record[key]).lower())
    if truth is None:
        raise BadRecord(f"{key!r} is neither true nor false", "; give one of them")
    return truth
