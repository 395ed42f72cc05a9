"""Preference files to the two sets of token pairs that a run works with: trained on, and held out.

The token ids of files are kept in a cache, which later starts map instead of tokenizing again: a directory
that appears whole or not at all, named after a fingerprint of all it was made from. A torn one is made anew.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.pair_tokens import PairTokens, TokenPair
from minidpo.data.paths import data_files
from minidpo.data.preference_files import read_files
from minidpo.data.preferences import ASSISTANT
from minidpo.data.report import DataReport
from minidpo.data.tokenizer import Tokenizer
from minidpo.data.truncation import tokenize_pairs
from minidpo.errors import UserError, one_line
from minidpo.files import fingerprint, read_arrays, replacing_directory, write_arrays, writing
from minidpo.log import Progress, print0
from minidpo.sections import DataSection

# Of the code from text to ids. Raise it with a change of the ids of a text, and caches are made anew.
_VERSION = "8"

# By what `split_by_prompt` tells prompts apart. A run that is resumed must hold out what it held out before.
HELD_OUT_BY = "the prompts as the records have them, dropped ones too"


def load_pairs(
    data: DataSection,
    tokenizer: Tokenizer,
    seed: int,
    cache: Path | None = None,
    check: Callable[[PairTokens, PairTokens], None] | None = None,
    check_first: Callable[[str, int, bool], None] | None = None,
) -> tuple[PairTokens, PairTokens]:
    """Read, tokenize and report data.train and data.eval. Returns (train, held out).

    With no eval file, about `eval_pairs` pairs are held out of train by prompt: no prompt is on both sides.
    cache: where token ids are kept between starts unless data.cache names a directory; None: nowhere. check:
    raises UserError for pairs that the run cannot use, before anything is kept. check_first: the same for a
    file, the responses of its first pair and whether that has a label, as to tokenize all may take minutes.
    """
    cache = Path(data.cache) if data.cache else cache
    template = tokenizer.chat_template(data.template, data.date)
    sets: list[PairTokens] = []
    to_keep: list[tuple[Path, PairTokens, np.ndarray, list[str]]] = []
    # Eval files are short: what is wrong with them is said before the long ones are read.
    for name, files in (("eval", data_files(data.eval)), ("train", data_files(data.train))):
        if not files:
            continue
        directory = cache / f"{name}-{_identity(files, data, tokenizer, template)[:16]}" if cache else None
        kept = _load(directory, files) if directory else None
        pairs, read, report = kept or _tokenize(name, files, data, tokenizer, template, check_first)
        sets.append(pairs)
        if kept:
            print0(f"token ids: mapped from {directory}")
        elif directory:
            to_keep.append((directory, pairs, read, report))
        if pairs.on_messages:
            pairs.date = template.date
            template.tell_date()
        print0("\n".join(report))
    train = sets[-1]
    if data.eval:
        held_out = sets[0]
        if shared := {*held_out.token_keys()} & {*train.token_keys()}:
            print0(f"warning: {len(shared)} prompts are in both data.train and data.eval")
    else:
        of_pairs, of_records = ([key.tobytes() for key in keys] for keys in (train.columns()["key"], read))
        mask = split_by_prompt(of_pairs, data.eval_pairs, seed, of_records)
        train, held_out = train.select(~mask), train.select(mask)
        if data.eval_pairs:
            what = "responses" if train.responses == 1 else "pairs"
            print0(f"held out {len(held_out)} {what} by prompt, {len(train)} left to train on")
    if check:
        check(train, held_out)
    for new in to_keep:
        _keep(*new)
    return train, held_out


def split_by_prompt(
    prompts: Sequence[bytes], eval_count: int, seed: int, of_records: Sequence[bytes] | None = None
) -> np.ndarray:
    """Choose the pairs to hold out. prompts: one key per pair. of_records: one per record, of those too that
    were dropped; None: none were. Returns a mask, true for a pair that is held out.

    A prompt is held out with all its pairs or not at all. Prompts are ranked by a hash of (seed, prompt) and
    taken while their records fit into `eval_count`, so that neither the order of the file nor what a limit or
    a template drops changes anything. Raises `UserError` if nothing would be left on either side.
    """
    records = Counter(prompts if of_records is None else of_records)
    held_out, left = set(), eval_count
    for key in sorted(records, key=lambda key: hashlib.blake2b(key, key=str(seed).encode()).digest()):
        if records[key] <= left:
            held_out.add(key)
            left -= records[key]
    mask = np.array([key in held_out for key in prompts])
    if eval_count and (mask.all() or not mask.any()):
        what = f"data.eval_pairs = {eval_count} of {records.total()} records, held out by prompt, leave none"
        raise UserError(f"{what} to {'train on; choose fewer' if mask.all() else 'hold out; choose more'}")
    return mask


def require_margins(pairs: PairTokens) -> None:
    """Raises `UserError` that names the first records without a margin, if there are any."""
    without = np.ones(len(pairs), bool) if pairs.margin is None else np.isnan(pairs.margin)
    if without.any():
        records = pairs.records(np.flatnonzero(without)[:5])
        what = f"loss.margin_from_data: {without.sum()} of {len(pairs)} pairs have no margin ({records})"
        raise UserError(f"{what}; give each record `margin`, or `score_chosen` and `score_rejected`")


def require_messages(
    key: str, template: ChatTemplate, pairs: PairTokens, tokenizer: Tokenizer, records: str = "the records"
) -> None:
    """Raises `UserError` where a template was asked for, by `key`, and none of `records` has messages for it:
    it would become the trained model's own. HH dialogues are text that hh describes."""
    if not template.asked_for or pairs.on_messages:
        return
    start, end = pairs.bounds[0, :2]
    if template.kind != "hh" or not tokenizer.decode(pairs.ids[start:end].tolist()).endswith(ASSISTANT):
        way = 'leave it out, or set data.text = "template" (--text template) to make turns of prompts in text'
        raise UserError(f"{key} = {template.kind} is for messages, and {records} are text; {way}")


def require_fit(role: str, model: Any, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError unless `model`, a ModelConfig, takes texts of max_length and the tokenizer's ids."""
    if max_length > model.max_length:
        keys = "max_position_embeddings, sliding_window or LongRoPE's original length in its config.json"
        what = f"texts of up to {max_length} tokens (max_length), but the {role} takes {model.max_length}"
        raise UserError(f"{what} ({keys})")
    if tokenizer.vocab_size > model.vocab_size:
        what = f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the {role}'s embedding"
        raise UserError(f"{what} {model.vocab_size} rows; they do not belong together")


def _identity(files: list[str], data: DataSection, tokenizer: Tokenizer, template: ChatTemplate) -> str:
    """Of all that ids and report depend on: what is in the files and how they are named, and the settings."""
    of_reading = (data.text, data.columns, data.pairs_per_prompt, data.min_margin, data.limit)
    settings = json.dumps((data.max_length, data.max_prompt_length, data.skip_bad, files, *of_reading))
    return fingerprint(_VERSION, tokenizer.identity, template.identity, settings, *map(Path, files))


def _tokenize(
    name: str,
    files: list[str],
    data: DataSection,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    check: Callable[[str, int, bool], None] | None,
) -> tuple[PairTokens, np.ndarray, list[str]]:
    """The pairs of `files` as ids, the prompt keys of all records, and the lines of the report."""
    report = DataReport()
    texts = read_files(files, data, tokenizer, template, report)

    def ids() -> Iterator[TokenPair]:
        progress = Progress(f"tokenizing {name}", None, "tokens")
        pairs = tokenize_pairs(texts, tokenizer, data.max_length, data.max_prompt_length, report)
        for number, pair in enumerate(pairs):
            if number == 0 and check:
                check(files[pair.file], len(pair.responses), pair.label is not None)
            yield pair
            progress.advance(len(pair.prompt) + sum(map(len, pair.responses)))
        progress.close()

    pairs = PairTokens.from_pairs(ids(), tuple(files))
    kept = np.searchsorted(np.asarray(report.places), pairs.columns()["file"] << 40 | pairs.index)
    keys = np.frombuffer(report.keys, np.uint8).reshape(-1, 16)
    return replace(pairs, key=keys[kept]), keys, list(report.lines())


def _keep(directory: Path, pairs: PairTokens, read: np.ndarray, report: list[str]) -> None:
    about = {"report": json.dumps(report)}
    columns = pairs.columns() | {"read": read}
    columns |= {} if pairs.unscored is None else {"unscored": pairs.unscored}
    with writing(directory), replacing_directory(directory) as temporary:
        np.save(temporary / "ids.npy", pairs.ids)
        about["ids"] = fingerprint(temporary / "ids.npy")
        write_arrays(temporary / "columns.safetensors", columns, about)


def _load(directory: Path, files: list[str]) -> tuple[PairTokens, np.ndarray, list[str]] | None:
    """What `_keep` wrote; None if there is nothing, or if it is no longer what was written."""
    try:
        columns, about = read_arrays(directory / "columns.safetensors")
        if fingerprint(directory / "ids.npy") != about.pop("ids", ""):
            raise ValueError("its ids.npy is not what was written")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print0(f"token ids: {directory} is spoilt ({one_line(error)}) and is made anew")
        return None
    ids = np.asarray(np.load(directory / "ids.npy", mmap_mode="r"))
    read = columns.pop("read")
    return PairTokens(ids, files=tuple(files), date="", **columns), read, json.loads(about["report"])
