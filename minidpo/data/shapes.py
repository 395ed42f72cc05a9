"""The shapes in which preferences are published, in one table; tests/data/test_shapes.py has records of each.

The first record of a file decides its shape, by its keys: the first shape of the table whose keys it has. A
key that is null is not there. `data.columns` gives keys of a record the names that the table has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from minidpo.data.bad_record import BadRecord, printable
from minidpo.data.messages import as_text, from_json
from minidpo.data.readings import At, Reading, of_answers, of_one, of_pair, of_preference, of_vote

BESIDE_MESSAGES = ("system", "tools", "chat_template_kwargs")  # read in every shape
OPTIONAL = {"system", "tools", "margin"}  # Some records of a file may lack them, whatever they are called.


@dataclass(frozen=True)
class Shape:
    """A row of the table. name: empty where the kind of the values names it, see preferences.py. needs,
    may_have: what stands under which key. in_text: the keys whose messages are JSON text in this file."""

    name: str
    needs: At
    read: Callable[[dict, At, bool], list[Reading]]
    may_have: At = field(default_factory=dict)
    in_text: tuple[str, ...] = ()

    @cached_property
    def at(self) -> At:
        return {**self.needs, **self.may_have}

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(self.at.values())

    def readings(self, record: dict, every: bool = False) -> list[Reading]:
        """See readings.py. Raises `BadRecord` for a missing key and for a value of another kind."""
        if self.in_text:
            record = record | {key: from_json(record, key) for key in self.in_text}
        for key in self.needs.values():
            if record.get(key) is None:
                raise _missing(record, key)
        return self.read(record, self.at, every)


def renamed(record: dict, columns: Mapping[str, str]) -> dict:
    """The record with its keys named as data.columns says. A name without a key takes that key away."""
    if not columns:
        return record
    for name, key in columns.items():
        if key and key not in record and name not in OPTIONAL:
            there = ", ".join(map(printable, record))
            raise BadRecord(f"no key {key!r}", f", which data.columns.{name} names; its keys are {there}")
    apart = {*columns, *columns.values()}
    others = {key: value for key, value in record.items() if key not in apart}
    return others | {name: record.get(key) for name, key in columns.items() if key}


def shape_of(record: dict, columns: Mapping[str, str] | None = None) -> Shape:
    """The first shape that a record has and that reads all its `columns` that were named. Raises `BadRecord`
    if there is none."""
    there = {key for key, value in record.items() if value is not None}
    named = {name for name, key in (columns or {}).items() if key}.difference(BESIDE_MESSAGES)
    for shape in SHAPES:
        # A prompt that is called so is the prompt, whatever else might be.
        other_prompt = "prompt" in there and shape.at.get("prompt", "prompt") != "prompt"
        if there.issuperset(shape.needs.values()) and named <= shape.keys and not other_prompt:
            in_text = tuple(key for key in as_text(record) if key in shape.keys)
            return replace(shape, in_text=in_text) if in_text else shape
    nulls = [key for shape in SHAPES for key in shape.needs.values() if record.get(key, "") is None]
    key = "rejected" if "chosen" in there else "chosen"
    raise _missing(record, key if key in record else next(iter(nulls), key))


def keys_of(record: dict) -> str:
    """The keys that a record has and those that it should have, for the end of an error message."""
    names = ", ".join(map(printable, record)) or "none"
    names = names if len(names) <= 200 else names[:200] + " ..."
    right = "give chosen, rejected, and prompt unless they hold it"
    which = "say which they are (--data.columns.chosen=KEY, --column chosen=KEY)"
    return f"; its keys are {names}; {right}, or {which}; SFT takes prompt and completion, or messages"


def _missing(record: dict, key: str) -> BadRecord:
    if key in record:
        return BadRecord(f"{key!r} is null", "; give a value")
    return BadRecord(f"no key {key!r}", keys_of(record))


_RESPONSES = {"chosen": "chosen", "rejected": "rejected"}
_MARGINS = {name: name for name in ("margin", "score_chosen", "score_rejected")}
_COMPLETION = {"prompt": "prompt", "completion": "completion"}


SHAPES = (
    # Two answers and which of them is better
    Shape(
        "HelpSteer2 preferences",
        {"prompt": "prompt", "first": "response_1", "second": "response_2", "margin": "preference_strength"},
        of_preference,
    ),
    Shape(
        "HelpSteer3 preferences",
        {"prompt": "context", "first": "response1", "second": "response2", "margin": "overall_preference"},
        of_preference,
    ),
    Shape(
        "SHP votes",
        {"prompt": "history", "A": "human_ref_A", "B": "human_ref_B", "A is better": "labels"},
        of_vote,
        {"score of A": "score_A", "score of B": "score_B"},
    ),
    # Several answers
    Shape("ranked answers", {"prompt": "prompt", "answers": "answers"}, of_answers("answer", "rank")),
    Shape(
        "scored completions",
        {"prompt": "instruction", "answers": "completions"},
        of_answers("response", "overall_score"),
    ),
    # Chosen and rejected
    Shape("sharegpt pairs", {"prompt": "conversations", **_RESPONSES}, of_pair, _MARGINS),
    Shape("orca pairs", {"prompt": "question", **_RESPONSES}, of_pair, _MARGINS),
    Shape("alpaca pairs", {"prompt": "instruction", **_RESPONSES}, of_pair, {"input": "input", **_MARGINS}),
    Shape("distilabel pairs", {"prompt": "input", **_RESPONSES}, of_pair, _MARGINS),
    Shape("", _RESPONSES, of_pair, {"prompt": "prompt", **_MARGINS}),
    # One response
    Shape("labelled responses", {**_COMPLETION, "label": "label"}, of_one),
    Shape("prompts with a completion", _COMPLETION, of_one),
    Shape("prompts with a chosen response", {"prompt": "prompt", "chosen": "chosen"}, of_one),
    Shape("conversations", {"messages": "messages"}, of_one),
    Shape("sharegpt conversations", {"messages": "conversations"}, of_one),
    Shape("alpaca", {"prompt": "instruction", "completion": "output"}, of_one, {"input": "input"}),
)
