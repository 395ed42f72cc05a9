"""Preference files to pairs: every record of a file, read as its first one, and counted."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.preferences import ASSISTANT, DEFAULTS, NO_DIALOGUE, PreferencePair, Unusable, pair_of
from minidpo.data.records import BadRecord, read_records
from minidpo.data.report import DataReport, FileReport, dropped_lines
from minidpo.data.shapes import BESIDE_MESSAGES, OPTIONAL, Shape, keys_of, renamed, shape_of
from minidpo.data.tokenizer import Tokenizer
from minidpo.errors import UserError
from minidpo.sections import DataSection

_LOOKED_AT = 100  # first pairs of a file, because one program wrote all of them


def read_preferences(
    path: str | Path,
    report: DataReport | None = None,
    drop_identical: bool = True,
    template: ChatTemplate | None = None,
    data: DataSection = DEFAULTS,
) -> Iterator[PreferencePair]:
    """Yield the usable pairs of one file, in file order. All its records have the shape of the first one.

    report: what is dropped, why and on which lines is added to it; the records that it has count towards
    data.limit. Raises `UserError` for a file or record that cannot be read, when it gets there, and at the
    end of a file without a usable pair.
    """
    report = DataReport() if report is None else report
    file, file_number, keys = FileReport(str(path)), len(report.files), ""  # keys: of the first record
    left = data.limit - sum(each.read for each in report.files) if data.limit else None
    report.files.append(file)
    shape: Shape | None = None
    for number, record in islice(read_records(Path(path)), left):
        index = file.read
        file.read += 1
        file.unit = "line" if number > index else "record"  # Only the records of a list are numbered from 0.
        try:
            if isinstance(record, BadRecord):
                raise record
            keys = keys or keys_of(record)
            record = renamed(record, data.columns)
            shape = shape or shape_of(record, data.columns)
            readings = shape.readings(record, data.pairs_per_prompt == "all")
            name = shape.name or readings[0].form
            file.format = file.format or name
            if name != file.format:
                raise BadRecord(f"a record of {name}", f" in a file of {file.format}; keep to one")
            where, kept = (index, file_number), file.pairs
            note = partial(report.add_prompt, index=index, file=file_number)
            for reading in readings:
                try:
                    pair = pair_of(record, shape, reading, template, data, drop_identical, note, *where)
                except Unusable as reason:
                    file.dropped[str(reason)].append(number)
                    continue
                _note(file, pair, record, data)
                yield pair
            file.kept += file.pairs > kept
        except BadRecord as bad:
            if not data.skip_bad:
                place = f"{path}:{number}" if file.unit == "line" else f"{path}: record {number}"
                raise UserError(f"{place}: {bad}") from None
            file.dropped[bad.kind].append(number)
    if not file.kept:
        reasons = ", ".join(dropped_lines(file.dropped, file.unit)) or "the file is empty"
        what = f"{path}: no usable pair in {file.read} records ({reasons})"
        other_keys = keys if shape is None or NO_DIALOGUE in file.dropped else ""
        raise UserError(f"{what}; one at least is needed{other_keys}")
    if unseen := sorted(name for name in OPTIONAL if data.columns.get(name) and name not in file.noted):
        named = ", ".join(f"data.columns.{name} = {data.columns[name]!r}" for name in unseen)
        raise UserError(f"{path}: no record has the key of {named}{keys.partition('; give')[0]}")
    at = {**(shape.at if shape else {}), **{key: key for key in BESIDE_MESSAGES}}
    told = {name: data.columns.get(key, key) for name, key in at.items() if key in file.noted}
    file.columns = {name: key for name, key in told.items() if name != key and key not in file.unread}


def read_files(
    files: Sequence[str], data: DataSection, tokenizer: Tokenizer, template: ChatTemplate, report: DataReport
) -> Iterator[PreferencePair]:
    """The usable pairs of several files, as data says; see `read_preferences` and `stop_if_glued`."""
    for file in files:
        if data.limit and sum(each.read for each in report.files) >= data.limit:
            return
        pairs = read_preferences(file, report, template=template, data=data)
        yield from stop_if_glued(pairs, file, tokenizer, template, data.text)


def _note(file: FileReport, pair: PreferencePair, record: dict, data: DataSection) -> None:
    """Count a pair, and which keys of its record were read and which were not."""
    file.pairs += 1
    file.margins += pair.margin is not None
    if pair.left_out:
        file.left_out[pair.left_out] += 1
    if pair.unread:
        file.unread.update(data.columns.get(key, key) for key in pair.unread)
    if not record.keys() <= file.noted:
        file.noted.update(key for key, value in record.items() if value not in (None, ""))


def stop_if_glued(
    pairs: Iterable[PreferencePair], path: str | Path, tokenizer: Tokenizer, template: ChatTemplate, text: str
) -> Iterator[PreferencePair]:
    """The pairs of a file. Raises `UserError` if they look like text that was made for the chat template, and
    data.text does not say what to do with it.

    A prompt for a chat model has no special token and no marker of HH dialogues, and ends without white space
    where its response begins: as raw text, "2 + 2?Four".
    """
    rest = iter(pairs)
    first = list(islice(rest, _LOOKED_AT))
    raw = [pair for pair in first if not pair.messages]
    if raw and not text and template.form is not None and not template.asked_for:
        marks = ("\n\nHuman:", ASSISTANT, *tokenizer.special_ids)
        glued = [pair for pair in raw if not (pair.prompt[-1:].isspace() or pair.chosen[:1].isspace())]
        # A few may be glued by accident.
        if len(glued) > len(raw) / 2 and not any(mark in pair.prompt for pair in raw for mark in marks):
            meet = glued[0].prompt[-40:] + glued[0].chosen[:40]
            what = f"text without turns, for a model with a chat template: it would read {meet!r}"
            put = 'set data.text = "template" (--text template) to put prompts through the template'
            raise UserError(f'{path}: {what}; {put}, or "raw" to leave them as they are')
    return chain(first, rest)
