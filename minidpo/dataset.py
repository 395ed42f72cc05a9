"""Preference files to the two sets of token pairs a run works with: trained on, and held out."""

from pathlib import Path

import numpy as np

from minidpo.config import DataSection, OptimSection
from minidpo.data import DataReport, read_preferences, split_by_prompt
from minidpo.errors import UserError
from minidpo.metrics import Progress, say
from minidpo.model import ModelConfig
from minidpo.packing import PairTokens
from minidpo.tokenizer import Tokenizer, tokenize_pairs


def load_pairs(
    data: DataSection, optim: OptimSection, tokenizer: Tokenizer, model: ModelConfig, seed: int
) -> tuple[PairTokens, PairTokens]:
    """Read, tokenize and report data.train and data.eval; returns (train, held out).

    With no eval file about `eval_pairs` pairs are held out of train, by prompt: no prompt is on both sides.
    Raises UserError where limits do not fit the model or the micro-batch.
    """
    if data.max_length > model.max_length:
        raise UserError(
            f"data.max_length = {data.max_length}, but the model takes {model.max_length} tokens"
            " (max_position_embeddings or sliding_window in its config.json)"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's embedding {model.vocab_size} rows;"
            " they do not belong together"
        )
    train = _tokenize("train", data.train, data, tokenizer)
    if data.eval:
        held_out = _tokenize("eval", data.eval, data, tokenizer)
        shared = {*prompt_keys(held_out)} & {*prompt_keys(train)}
        if shared:
            say(f"warning: {len(shared)} prompts are in both data.train and data.eval")
    elif data.eval_pairs:
        mask = np.array(split_by_prompt(prompt_keys(train), data.eval_pairs, seed))
        train, held_out = train.select(np.flatnonzero(~mask)), train.select(np.flatnonzero(mask))
        say(f"held out {len(held_out)} pairs by prompt, {len(train)} left to train on")
    else:
        held_out = train.select(np.zeros(0, dtype=int))
    longest = max(int(part.lengths.sum(axis=1).max(initial=0)) for part in (train, held_out))
    if longest > optim.micro_tokens:
        raise UserError(
            f"optim.micro_tokens = {optim.micro_tokens}, but one pair has {longest} tokens; it must be at least that"
        )
    return train, held_out


def prompt_keys(pairs: PairTokens) -> list[bytes]:
    """The prompts' token ids as bytes: equal prompts, equal keys."""
    return [pairs.ids[start:end].tobytes() for start, end in pairs.bounds[:, :2]]


def _tokenize(name: str, files: list[str], data: DataSection, tokenizer: Tokenizer) -> PairTokens:
    report = DataReport()
    progress = Progress(f"tokenizing {name}", unit="pairs")
    texts = (pair for file in files for pair in read_preferences(Path(file), report))
    tokens = tokenize_pairs(texts, tokenizer, data.max_length, data.max_prompt_length, report)
    pairs = PairTokens.from_pairs(progress.over(tokens))
    for line in report.lines():
        say(line)
    return pairs
