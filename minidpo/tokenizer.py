"""Text to token ids, and pairs of texts to pairs of ids.

    prompt ids      what the tokenizer makes of the prompt alone: the model is asked with exactly these
    ending ids      what prompt + ending adds to them, then EOS, once
    boundary        where the two meet; a tokenizer may merge characters from both sides into one token

Nothing here knows of padding: a pair is three lists, and what is scored is told by where a token stands,
never by its id.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import tokenizers

from minidpo.chat import ChatTemplate
from minidpo.data import DataReport, PreferencePair
from minidpo.errors import UserError, one_line
from minidpo.files import fingerprint, require_file
from minidpo.formats import Prompt
from minidpo.tokenizer_files import find_eos

NO_PROMPT_TOKEN = "the prompt has no token, so nothing predicts the first token of an ending"
TOO_LONG = "longer than max_length"
EMPTY_AFTER_CUT = "truncation left an ending empty"
IDENTICAL_AFTER_CUT = "endings identical as tokens or after truncation"

_CHUNK = 256  # pairs in one encode_batch: enough for all threads, and few Encodings in memory


class TokenPair(NamedTuple):
    """Ids of one prompt and its two endings, each ending in EOS unless cut. The rest: see PreferencePair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a pair
    margin: float | None = None
    file: int = 0


class TokenRow(NamedTuple):
    """One token of a pair as it is laid out: see `describe_pair`."""

    role: str  # prompt, chosen, rejected or eos
    position: int
    id: int
    piece: str  # as the vocabulary spells it: a leading space may read "Ġ" or "▁"
    scored: bool


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows where text ends.

    eos_id: the token that ends a text. bos_id: the token `encode` puts before every text, None if it puts
    none, whatever the directory calls its BOS. vocab_size: the highest id + 1, the least number of
    embedding rows that will do.
    """

    def __init__(self, core: tokenizers.Tokenizer, eos_id: int, directory: Path | None = None) -> None:
        core.no_truncation()
        core.no_padding()
        self._core, self._directory = core, directory
        self.eos_id = eos_id
        probe = core.encode("a")
        self.bos_id: int | None = probe.ids[0] if probe.special_tokens_mask[:1] == [1] else None
        self.vocab_size = max(core.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Load tokenizer.json of a Hugging Face directory, and its EOS from the configs beside it.

        Raises `UserError` where tokenizer.json is missing or broken, and where no EOS is named or the one
        named is not in the vocabulary.
        """
        file = require_file(Path(path) / "tokenizer.json", "a model directory with a fast tokenizer has one")
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
            core.encode("a")
            if not core.get_vocab(with_added_tokens=True):
                raise ValueError("its vocabulary is empty")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # all that the library raises, and its panics are no Exception
            raise UserError(
                f"{file}: not a tokenizer that loads ({one_line(error)}); fetch it again"
            ) from None
        return cls(core, find_eos(Path(path), core.get_vocab(with_added_tokens=True)), Path(path))

    def chat_template(self, kind: str = "model") -> ChatTemplate:
        """How messages become text for this tokenizer; kind: model, hh or chatml."""
        bos = "" if self.bos_id is None else self.piece(self.bos_id)
        return ChatTemplate(kind, self._directory, self.piece(self.eos_id), bos)

    @cached_property
    def identity(self) -> str:
        """A fingerprint: equal for tokenizers that give every text the same ids."""
        return fingerprint(tokenizers.__version__, self._core.to_str(), str(self.eos_id))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; `add_special_tokens`: with those that tokenizer.json's post-processor adds (BOS)."""
        return self._core.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._core.decode(ids, skip_special_tokens=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt.text, prompt.add_special_tokens)

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """What `encode` makes `ids` of: special tokens written out, but for the BOS that it adds itself.

        Where `ids` are a prompt that lost its beginning, the first token may come out as another."""
        added = list(ids[:1]) == [self.bos_id]
        text = self._core.decode(ids[1:] if added else ids, skip_special_tokens=False)
        return Prompt(text, add_special_tokens=added or self.bos_id is None)

    def piece(self, token: int) -> str:
        """One id as the vocabulary spells it; empty for an id it does not have."""
        return self._core.id_to_token(token) or ""

    def encode_pair(self, pair: PreferencePair) -> TokenPair:
        """Ids of one pair by the boundary rule, whole. Raises `ValueError` for a prompt without a token."""
        token_pair = self.encode_pairs([pair])[0]
        if not token_pair.prompt:
            raise ValueError(f"prompt {pair.prompt!r}: {NO_PROMPT_TOKEN}; give a prompt")
        return token_pair

    def encode_pairs(self, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
        """`encode_pair` of many at once, on all threads. A prompt may come out empty: check it."""
        return [
            token_pair
            for add_special, alike in groupby(pairs, key=lambda pair: pair.add_special_tokens)
            for token_pair in self._encode_alike(list(alike), add_special)
        ]

    def _encode_alike(self, pairs: list[PreferencePair], add_special_tokens: bool) -> Iterator[TokenPair]:
        texts = [text for p in pairs for text in (p.prompt, p.prompt + p.chosen, p.prompt + p.rejected)]
        encodings = self._core.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        ids = [encoding.ids for encoding in encodings]
        for pair, prompt, with_chosen, with_rejected in zip(
            pairs, ids[0::3], ids[1::3], ids[2::3], strict=True
        ):
            chosen = self._ending(prompt, with_chosen, pair.chosen)
            rejected = self._ending(prompt, with_rejected, pair.rejected)
            yield TokenPair(prompt, chosen, rejected, pair.index, pair.margin, pair.file)

    def _ending(self, prompt: list[int], joint: list[int], ending_text: str) -> list[int]:
        """The boundary rule. The joint text comes first because a tokenizer that prepends a space to every
        text (Llama 2, Mistral) would put one before each ending; where it merged across the boundary it
        cannot be used, for its prompt is not the one the model is asked with."""
        if joint[: len(prompt)] == prompt:
            ending = joint[len(prompt) :]
        else:
            ending = self.encode(ending_text, add_special_tokens=False)
        return ending if ending[-1:] == [self.eos_id] else [*ending, self.eos_id]


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    tokenizer: Tokenizer,
    max_length: int,
    max_prompt_length: int | None = None,
    report: DataReport | None = None,
    truncate: bool = True,
    drop_identical: bool = True,
) -> Iterator[TokenPair]:
    """Yield the pairs as ids, in order, cut to `max_length` tokens for prompt + ending with its EOS.

    A prompt longer than `max_prompt_length` (None: `max_length`) loses its beginning, BOS excepted. Each
    ending then has the rest of `max_length` to itself and loses its end, EOS included: a model must not
    learn to stop where a text was cut. Pairs that this leaves without an ending, or with two equal ones
    (unless `drop_identical=False`), are dropped and counted in `report`, as are prompts without a token.
    `truncate=False` cuts nothing and drops what would have to be cut, so that every score is of a whole text.
    Raises `UserError` for limits that contradict each other, and where no pair is left.
    """
    limit = max_length if max_prompt_length is None else max_prompt_length
    if not 1 <= limit <= max_length:
        raise UserError(f"max_prompt_length = {limit} must lie between 1 and max_length = {max_length}")
    report = DataReport() if report is None else report
    report.limits = (max_length, limit)
    kept_before, source = report.kept, iter(pairs)
    while chunk := list(islice(source, _CHUNK)):
        for whole in tokenizer.encode_pairs(chunk):
            report.tokenized += 1
            for part, lengths in report.lengths.items():
                lengths.append(len(getattr(whole, part)))
            pair = _fit(whole, limit, max_length, tokenizer.bos_id)
            reason = _reason_to_drop(pair, truncate or pair is whole, drop_identical)
            if reason:
                report.dropped[reason].append((pair.file, pair.index))
                continue
            report.prompts.append(hash(tuple(pair.prompt)))
            report.truncated_prompts += len(pair.prompt) < len(whole.prompt)
            for cut, full in ((pair.chosen, whole.chosen), (pair.rejected, whole.rejected)):
                report.truncated_endings += len(cut) < len(full)
            report.prompt_tokens += len(pair.prompt)
            report.ending_tokens += len(pair.chosen) + len(pair.rejected)
            yield pair
    if report.kept == kept_before:
        reasons = ", ".join(report.dropped_lines())
        raise UserError(
            f"no pair is left to use with max_length = {max_length} ({reasons}); raise it or change the data"
        )


def describe_pair(pair: TokenPair, tokenizer: Tokenizer) -> list[TokenRow]:
    """Every token of a pair in the order it is laid out, prompt | chosen | rejected, with its position and
    whether it is scored. Positions of rejected restart where the prompt ended: it follows the prompt too.
    The EOS of an ending has a role of its own, and is scored like the rest of the ending."""
    rows = []
    for part in ("prompt", "chosen", "rejected"):
        ids = getattr(pair, part)
        start = 0 if part == "prompt" else len(pair.prompt)
        for offset, token in enumerate(ids):
            ends = part != "prompt" and offset == len(ids) - 1 and token == tokenizer.eos_id
            piece = tokenizer.piece(token)
            rows.append(TokenRow("eos" if ends else part, start + offset, token, piece, part != "prompt"))
    return rows


def _fit(pair: TokenPair, prompt_limit: int, max_length: int, bos_id: int | None) -> TokenPair:
    """The pair cut to the limits: prompt from the left, each ending from the right by its own length.
    A pair that fits comes back as it is."""
    prompt = pair.prompt
    longest = len(prompt) + max(len(pair.chosen), len(pair.rejected))
    if len(prompt) <= prompt_limit and longest <= max_length:
        return pair
    if len(prompt) > prompt_limit:
        head = prompt[:1] if prompt[0] == bos_id else []
        prompt = head + prompt[len(prompt) - (prompt_limit - len(head)) :]
    room = max_length - len(prompt)
    return pair._replace(prompt=prompt, chosen=pair.chosen[:room], rejected=pair.rejected[:room])


def _reason_to_drop(pair: TokenPair, whole_enough: bool, drop_identical: bool) -> str:
    """Why a fitted pair cannot be used; empty if it can."""
    if not pair.prompt:
        return NO_PROMPT_TOKEN
    if not whole_enough:
        return TOO_LONG
    if not (pair.chosen and pair.rejected):
        return EMPTY_AFTER_CUT
    if drop_identical and pair.chosen == pair.rejected:
        return IDENTICAL_AFTER_CUT
    return ""
