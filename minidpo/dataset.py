"""Preference files to the two sets of token pairs a run works with: trained on, and held out."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np

from minidpo.data import DataReport, read_preferences, split_by_prompt
from minidpo.errors import UserError
from minidpo.files import fingerprint
from minidpo.metrics import Progress, say
from minidpo.model import ModelConfig
from minidpo.records import check_path
from minidpo.sections import DataSection, OptimSection
from minidpo.token_store import PairTokens, cached_pairs
from minidpo.tokenizer import Tokenizer, TokenPair, tokenize_pairs

# Of the code from text to ids: raise it when that gives other ids for the same text, and caches are made anew.
_VERSION = "1"


def load_pairs(
    data: DataSection,
    optim: OptimSection,
    tokenizer: Tokenizer,
    model: ModelConfig,
    seed: int,
    cache: Path | None = None,
) -> tuple[PairTokens, PairTokens]:
    """Read, tokenize and report data.train and data.eval; returns (train, held out).

    With no eval file about `eval_pairs` pairs are held out of train, by prompt: no prompt is on both sides.
    cache: where token ids are kept between starts unless data.cache names a place; None: nowhere.
    Raises UserError where limits do not fit the model or the micro-batch.
    """
    require_fit("model", model, tokenizer, data.max_length)
    cache = Path(data.cache) if data.cache else cache
    with ExitStack() as stores:  # token ids go to the cache when it is left: after the last refusal
        # Eval files come first, for they are short: what is wrong with them is said before the long ones are read.
        held_out = None
        if data.eval:
            held_out = stores.enter_context(tokenized("eval", data.eval, data, tokenizer, cache))
        train = stores.enter_context(tokenized("train", data.train, data, tokenizer, cache))
        if held_out is not None:
            shared = {*prompt_keys(held_out)} & {*prompt_keys(train)}
            if shared:
                say(f"warning: {len(shared)} prompts are in both data.train and data.eval")
        elif data.eval_pairs:
            mask = np.array(split_by_prompt(prompt_keys(train), data.eval_pairs, seed))
            train, held_out = train.select(np.flatnonzero(~mask)), train.select(np.flatnonzero(mask))
            say(f"held out {len(held_out)} pairs by prompt, {len(train)} left to train on")
        else:
            held_out = train.select(np.zeros(0, dtype=int))
        longest = longest_pair(train, held_out)
        if longest > optim.micro_tokens:
            raise UserError(
                f"optim.micro_tokens = {optim.micro_tokens}, but one pair has {longest} tokens; it must be at least that"
            )
    return train, held_out


@contextmanager
def tokenized(
    name: str, files: list[str], data: DataSection, tokenizer: Tokenizer, cache: Path | None = None
) -> Iterator[PairTokens]:
    """The pairs of `files` as ids, from the cache if they are in it; what became of the records is said.

    What had to be tokenized goes to the cache when the block ends well."""

    def build(ids_file: Path | None) -> tuple[PairTokens, list[str]]:
        report = DataReport()
        stream = stream_pairs(name, files, data, tokenizer, report)
        pairs = PairTokens.from_pairs(stream, tuple(files), ids_file)
        return pairs, list(report.lines())

    for file in files:
        check_path(Path(file))
    made: AbstractContextManager[tuple[PairTokens, list[str]]]
    if cache is None:
        made = nullcontext(build(None))
    else:
        made = cached_pairs(cache / f"{name}-{_identity(files, data, tokenizer)[:16]}", build)
    with made as (pairs, lines):
        for line in lines:
            say(line)
        yield pairs


def stream_pairs(
    name: str, files: list[str], data: DataSection, tokenizer: Tokenizer, report: DataReport
) -> Iterator[TokenPair]:
    """The pairs of `files` as ids, one after the other, with a progress line in tokens kept a second."""
    template = tokenizer.chat_template(data.template)
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


def longest_pair(*sets: PairTokens) -> int:
    """Tokens of the longest pair, laid out with both endings."""
    return max(int(pairs.lengths.sum(axis=1).max(initial=0)) for pairs in sets)


def require_margins(pairs: PairTokens) -> None:
    """Raises `UserError` that names the first records without a margin, if there are any."""
    without = np.ones(len(pairs), bool) if pairs.margin is None else np.isnan(pairs.margin)
    if without.any():
        raise UserError(
            f"loss.margin_from_data: {without.sum()} of {len(pairs)} pairs have no margin"
            f" ({pairs.records(np.flatnonzero(without)[:5])}); give each record a number `margin`, or numbers"
            " `score_chosen` and `score_rejected`"
        )


def require_fit(role: str, model: ModelConfig, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError where `model`, named by its role, cannot take texts of max_length or the tokenizer's ids."""
    if max_length > model.max_length:
        raise UserError(
            f"texts of up to {max_length} tokens (max_length), but the {role} takes {model.max_length}"
            " (max_position_embeddings or sliding_window in its config.json)"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the {role}'s embedding {model.vocab_size} rows;"
            " they do not belong together"
        )


def prompt_keys(pairs: PairTokens) -> list[bytes]:
    """A digest of each prompt's token ids: equal prompts, equal keys."""
    return [
        hashlib.blake2b(pairs.ids[start:end].data, digest_size=16).digest()
        for start, end in pairs.bounds[:, :2]
    ]


def _identity(files: list[str], data: DataSection, tokenizer: Tokenizer) -> str:
    """Of all that the ids and the report depend on: what is in the files and how they are named, and the settings."""
    settings = (data.max_length, data.max_prompt_length, data.skip_bad, files)
    template = tokenizer.chat_template(data.template).identity
    return fingerprint(_VERSION, tokenizer.identity, template, json.dumps(settings), *map(Path, files))
