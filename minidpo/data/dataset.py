"""Preference files to the two sets of token pairs that a run works with: trained on, and held out.

The token ids of files are kept in a cache, which later starts map instead of tokenizing again. It is a
directory that appears whole or not at all, named after a fingerprint of all it was made from: other files,
another tokenizer or other settings are another directory. A torn one is made anew.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minidpo.data.pair_tokens import PairTokens, TokenPair
from minidpo.data.preferences import read_preferences
from minidpo.data.records import check_path
from minidpo.data.report import DataReport
from minidpo.data.tokenizer import Tokenizer, tokenize_pairs
from minidpo.errors import UserError
from minidpo.files import fingerprint, replacing_directory, writing
from minidpo.log import Progress, print0
from minidpo.sections import DataSection

# Of the code from text to ids. Raise it with a change of the ids of a text, and caches are made anew.
_VERSION = "3"


def load_pairs(
    data: DataSection,
    tokenizer: Tokenizer,
    seed: int,
    cache: Path | None = None,
    check: Callable[[PairTokens, PairTokens], None] | None = None,
) -> tuple[PairTokens, PairTokens]:
    """Read, tokenize and report data.train and data.eval. Returns (train, held out).

    With no eval file, about `eval_pairs` pairs are held out of train by prompt: no prompt is on both sides.
    cache: where token ids are kept between starts unless data.cache names a directory; None: nowhere. check:
    raises UserError for pairs that the run cannot use. Nothing is kept before it, so that a refused run
    leaves nothing behind.
    """
    cache = Path(data.cache) if data.cache else cache
    sets: list[PairTokens] = []
    to_keep: list[tuple[Path, PairTokens, list[str]]] = []
    # Eval files are short: what is wrong with them is said before the long ones are read.
    for name, files in (("eval", data.eval), ("train", data.train)):
        if not files:
            continue
        for file in files:
            check_path(Path(file))
        directory = cache / f"{name}-{_identity(files, data, tokenizer)[:16]}" if cache else None
        kept = _load(directory) if directory else None
        pairs, report = kept or _tokenize(name, files, data, tokenizer)
        sets.append(pairs)
        if kept:
            print0(f"token ids: mapped from {directory}")
        elif directory:
            to_keep.append((directory, pairs, report))
        for line in report:
            print0(line)
    train = sets[-1]
    if data.eval:
        held_out = sets[0]
        if shared := {*held_out.prompt_keys()} & {*train.prompt_keys()}:
            print0(f"warning: {len(shared)} prompts are in both data.train and data.eval")
    else:
        mask = split_by_prompt(train.prompt_keys(), data.eval_pairs, seed)
        train, held_out = train.select(~mask), train.select(mask)
        if data.eval_pairs:
            print0(f"held out {len(held_out)} pairs by prompt, {len(train)} left to train on")
    if check:
        check(train, held_out)
    for new in to_keep:
        _keep(*new)
    return train, held_out


def split_by_prompt(prompts: Sequence[bytes], eval_count: int, seed: int) -> np.ndarray:
    """Choose the pairs to hold out. prompts: one key per pair. Returns a mask, true for a pair that is held
    out.

    A prompt is held out with all its pairs or not at all. Prompts are ranked by a hash of (seed, prompt) and
    taken while they fit into `eval_count`, so the order of the file changes nothing. Fewer than `eval_count`
    pairs are held out only if repeated prompts leave no exact sum. Raises `UserError` if nothing would be
    left on either side.
    """
    if not 0 <= eval_count < len(prompts):
        what = f"data.eval_pairs = {eval_count}, {eval_count} pairs to hold out of {len(prompts)}"
        raise UserError(f"{what}; give 0 to {len(prompts) - 1}")
    digests = [hashlib.blake2b(key, digest_size=16, key=str(seed).encode()).digest() for key in prompts]
    pairs, held_out, left = Counter(digests), set(), eval_count
    for digest in sorted(pairs):
        if pairs[digest] <= left:
            held_out.add(digest)
            left -= pairs[digest]
    if eval_count and not held_out:
        raise UserError(f"no prompt has as few as {eval_count} pairs, so none can be held out; hold out more")
    return np.array([digest in held_out for digest in digests])


def longest_pair(*sets: PairTokens) -> int:
    """Tokens of the longest pair, laid out with all its responses."""
    return max(int(pairs.tokens().max(initial=0)) for pairs in sets)


def require_margins(pairs: PairTokens) -> None:
    """Raises `UserError` that names the first records without a margin, if there are any."""
    without = np.ones(len(pairs), bool) if pairs.margin is None else np.isnan(pairs.margin)
    if without.any():
        records = pairs.records(np.flatnonzero(without)[:5])
        what = f"loss.margin_from_data: {without.sum()} of {len(pairs)} pairs have no margin ({records})"
        raise UserError(f"{what}; give each record `margin`, or `score_chosen` and `score_rejected`")


def require_fit(role: str, model: Any, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError unless `model` (a ModelConfig, named by its role) takes texts of max_length and the
    tokenizer's ids."""
    if max_length > model.max_length:
        keys = "max_position_embeddings or sliding_window in its config.json"
        what = f"texts of up to {max_length} tokens (max_length), but the {role} takes {model.max_length}"
        raise UserError(f"{what} ({keys})")
    if tokenizer.vocab_size > model.vocab_size:
        what = f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the {role}'s embedding"
        raise UserError(f"{what} {model.vocab_size} rows; they do not belong together")


def _identity(files: list[str], data: DataSection, tokenizer: Tokenizer) -> str:
    """Of all that ids and report depend on: what is in the files and how they are named, and the settings."""
    settings = json.dumps((data.max_length, data.max_prompt_length, data.skip_bad, files))
    template = tokenizer.chat_template(data.template).identity
    return fingerprint(_VERSION, tokenizer.identity, template, settings, *map(Path, files))


def _tokenize(
    name: str, files: list[str], data: DataSection, tokenizer: Tokenizer
) -> tuple[PairTokens, list[str]]:
    """The pairs of `files` as ids, and the lines of the report."""
    report, template = DataReport(), tokenizer.chat_template(data.template)

    def ids() -> Iterator[TokenPair]:
        texts = (
            pair
            for file in files
            for pair in read_preferences(file, report, template=template, skip_bad=data.skip_bad)
        )
        progress = Progress(f"tokenizing {name}", unit="tokens")
        for pair in tokenize_pairs(texts, tokenizer, data.max_length, data.max_prompt_length, report):
            yield pair
            progress.advance(len(pair.prompt) + len(pair.chosen) + len(pair.rejected))
        progress.close()

    return PairTokens.from_pairs(ids(), tuple(files)), list(report.lines())


def _keep(directory: Path, pairs: PairTokens, report: list[str]) -> None:
    texts = {"files": json.dumps(pairs.files), "report": json.dumps(report)}
    with writing(directory), replacing_directory(directory) as temporary:
        np.save(temporary / "ids.npy", pairs.ids)
        save_file(pairs.columns(), temporary / "columns.safetensors", metadata=texts)


def _load(directory: Path) -> tuple[PairTokens, list[str]] | None:
    """What `_keep` wrote; None if there is nothing, or a part of it is missing or torn."""
    try:
        ids = np.asarray(np.load(directory / "ids.npy", mmap_mode="r"))
        with safe_open(directory / "columns.safetensors", framework="numpy") as stored:
            columns = {name: stored.get_tensor(name) for name in stored.keys()}
            texts = {name: json.loads(text) for name, text in stored.metadata().items()}
    except (OSError, EOFError, ValueError, SafetensorError):
        return None
    return PairTokens(ids, files=tuple(texts["files"]), **columns), texts["report"]
