"""Preference files to pairs: every record of a file, read as its first one, and counted."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.preferences import ASSISTANT, NO_DIALOGUE, PreferencePair, Unusable, pair_of
from minidpo.data.readings import form_of
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
    skip_bad: bool = False,
    data: DataSection | None = None,
    limit: int = 0,
) -> Iterator[PreferencePair]:
    """Yield the usable pairs of one file, in file order. All its records have the shape of the first one.

    report: what is dropped, why and on which lines is added to it. skip_bad: drop and count records that
    cannot be read as well. data: how records are read. limit: records read; 0: all. Raises `UserError` for a
    file or record that cannot be read, when it gets there, and at the end of a file without a usable pair.
    """
    data, report = data or DataSection(), DataReport() if report is None else report
    file, file_number, keys = FileReport(str(path)), len(report.files), ""  # keys: of the first record
    report.files.append(file)
    shape: Shape | None = None
    for number, record in islice(read_records(Path(path)), limit or None):
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
            form = form_of(readings[0])
            file.format = file.format or shape.name or form
            if not shape.name and form != file.format:
                raise BadRecord(f"a record of {form}", f" in a file of {file.format}; keep to one")
            where = index, file_number, report, data
            kept = file.pairs
            for reading in readings:
                try:
                    pair = pair_of(record, shape, template, drop_identical, *where, reading)
                except Unusable as reason:
                    file.dropped[str(reason)].append(number)
                    continue
                _note(file, pair, record, shape, data)
                yield pair
            file.kept += file.pairs > kept
        except BadRecord as bad:
            if not (skip_bad or data.skip_bad):
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


def read_files(
    files: Sequence[str], data: DataSection, tokenizer: Tokenizer, template: ChatTemplate, report: DataReport
) -> Iterator[PreferencePair]:
    """The usable pairs of several files, as data says; see `read_preferences` and `stop_if_glued`."""
    for file in files:
        left = data.limit - sum(each.read for each in report.files) if data.limit else 0
        if data.limit and not left:
            return
        pairs = read_preferences(file, report, template=template, data=data, limit=left)
        yield from stop_if_glued(pairs, file, tokenizer, template, data.text)


def format_of(record: dict, data: DataSection) -> str:
    """What a record is read as. Raises `BadRecord` if that is nothing."""
    record = renamed(record, data.columns)
    shape = shape_of(record, data.columns)
    return shape.name or form_of(shape.readings(record)[0])


def _note(file: FileReport, pair: PreferencePair, record: dict, shape: Shape, data: DataSection) -> None:
    """Count a pair, and which keys of its record were read and which were not."""
    file.pairs += 1
    file.margins += pair.margin is not None
    if pair.left_out:
        file.left_out[pair.left_out] += 1
    if pair.unread:
        file.unread.update(data.columns.get(key, key) for key in pair.unread)
    if record.keys() <= file.noted:
        return
    file.noted.update(key for key, value in record.items() if value not in (None, ""))
    for name, key in (*shape.at.items(), *zip(BESIDE_MESSAGES, BESIDE_MESSAGES, strict=True)):
        told = data.columns.get(key, key)
        read = key in shape.keys or (pair.messages and key not in pair.unread)
        if read and name != told and record.get(key) not in (None, ""):
            file.columns.setdefault(name, told)


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
