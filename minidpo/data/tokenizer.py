"""Text to token ids, and pairs of texts to pairs of ids.

    prompt ids      what the tokenizer makes of the prompt alone: the model is asked with exactly these
    response ids    what prompt + response adds to them, then EOS, once
    boundary        where the two meet; a tokenizer may merge characters from both sides into one token

There is no padding: a pair is three lists, and the list of a token says whether it is scored, never its id.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import tokenizers

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.pair_tokens import TokenPair
from minidpo.data.preferences import PreferencePair, Prompt
from minidpo.data.report import PARTS, DataReport, dropped_lines
from minidpo.data.tokenizer_files import find_eos
from minidpo.errors import UserError, one_line
from minidpo.files import fingerprint, require_file

_CHUNK = 256  # pairs tokenized at once: enough for all threads, and little text in memory


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows where text ends.

    eos_id: the token that ends a text. bos_id: the token that `encode` puts before every text; None if it
    puts none, whatever the directory calls its BOS. vocab_size: the highest id + 1, the least number of
    embedding rows.
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
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Load tokenizer.json of a Hugging Face directory, and its EOS from the configs beside it.

        Raises `UserError` if tokenizer.json is missing or broken, or no EOS of its vocabulary is named.
        """
        file = require_file(Path(path) / "tokenizer.json", "a model directory with a fast tokenizer has one")
        try:
            core = tokenizers.Tokenizer.from_file(str(file))
            eos_id = find_eos(Path(path), core.get_vocab(with_added_tokens=True))
            return cls(core, eos_id, Path(path))
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # The library's panics are no Exception.
            raise UserError(f"{file}: not a tokenizer ({one_line(error)}); fetch it again") from None

    def chat_template(self, kind: str = "model") -> ChatTemplate:
        """How messages become text for this tokenizer; kind: model, hh or chatml."""
        bos = "" if self.bos_id is None else self.piece(self.bos_id)
        return ChatTemplate(kind, self._directory, self.piece(self.eos_id), bos)

    @cached_property
    def identity(self) -> str:
        """A fingerprint: equal for tokenizers that give every text the same ids."""
        return fingerprint(tokenizers.__version__, self._core.to_str(), str(self.eos_id))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; add_special_tokens: with those that tokenizer.json's post-processor adds (BOS)."""
        return self._core.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        return self._core.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """One id as the vocabulary spells it; empty for an id that it does not have."""
        return self._core.id_to_token(token) or ""

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt.text, prompt.add_special_tokens)

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """What `encode` makes `ids` of: special tokens are written out, but for the BOS that it adds itself.

        If `ids` are a prompt that lost its beginning, the first token may come out as another.
        """
        added = list(ids[:1]) == [self.bos_id]
        text = self._core.decode(ids[1:] if added else ids, skip_special_tokens=False)
        return Prompt(text, add_special_tokens=added or self.bos_id is None)

    def encode_responses(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Ids of each prompt, and of each of its responses by the boundary rule, with EOS; on all threads.

        Nothing is cut. A prompt may come out empty.
        """
        prompt_ids: list[list[int]] = []
        response_ids: list[list[list[int]]] = []
        both = zip(prompts, responses, strict=True)
        # The library takes one value of add_special_tokens per call.
        for add_special_tokens, group in groupby(both, key=lambda each: each[0].add_special_tokens):
            alike = list(group)
            texts = [prompt.text + text for prompt, its in alike for text in ("", *its)]
            encodings = self._core.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            ids = (encoding.ids for encoding in encodings)
            for _, its in alike:
                prompt_ids.append(next(ids))
                response_ids.append([self._response(prompt_ids[-1], next(ids), text) for text in its])
        return prompt_ids, response_ids

    def _response(self, prompt: list[int], joint: list[int], text: str) -> list[int]:
        """The boundary rule. joint: the ids of prompt + response, tokenized as one text.

        They come first because a tokenizer that prepends a space to every text (Llama 2, Mistral) would put
        one before a response alone. But if the tokenizer merged across the boundary, they do not begin with
        the prompt that the model is asked with, and the response has to be tokenized alone.
        """
        if joint[: len(prompt)] == prompt:
            response = joint[len(prompt) :]
        else:
            response = self.encode(text, add_special_tokens=False)
        return response if response[-1:] == [self.eos_id] else [*response, self.eos_id]

    def encode_pairs(self, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
        """`encode_responses` of chosen and rejected."""
        prompts = [Prompt(pair.prompt, add_special_tokens=pair.add_special_tokens) for pair in pairs]
        encoded = self.encode_responses(prompts, [(pair.chosen, pair.rejected) for pair in pairs])
        return [
            TokenPair(prompt, chosen, rejected, pair.index, pair.margin, pair.file)
            for pair, prompt, (chosen, rejected) in zip(pairs, *encoded, strict=True)
        ]

    def encode_pair(self, pair: PreferencePair) -> TokenPair:
        return self.encode_pairs([pair])[0]


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    tokenizer: Tokenizer,
    max_length: int,
    max_prompt_length: int | None = None,
    report: DataReport | None = None,
    truncate: bool = True,
    drop_identical: bool = True,
) -> Iterator[TokenPair]:
    """Yield the pairs as ids, in order, cut to `max_length` tokens for prompt + response with its EOS.

    A prompt longer than `max_prompt_length` (None: `max_length`) loses its beginning, BOS excepted. Each
    response then has the rest of `max_length` to itself and loses its end, EOS included: a model must not
    learn to stop where a text was cut. Pairs that this leaves without a response, or with two equal ones
    (unless `drop_identical=False`), are dropped and counted in `report`, as are prompts without a token.
    `truncate=False` cuts nothing and drops what would have to be cut, so that every score is of a whole text.
    Raises `UserError` for limits that contradict each other, and if no pair is left.
    """
    limit = max_length if max_prompt_length is None else max_prompt_length
    if not 1 <= limit <= max_length:
        raise UserError(f"max_prompt_length = {limit} must lie between 1 and max_length = {max_length}")
    report = DataReport() if report is None else report
    report.limits = (max_length, limit)
    source = iter(pairs)
    while chunk := list(islice(source, _CHUNK)):
        for whole in tokenizer.encode_pairs(chunk):
            pair, reason = _cut(whole, limit, max_length, tokenizer.bos_id), ""
            if not pair.prompt:
                reason = "the prompt has no token, so nothing predicts the first token of a response"
            elif pair != whole and not truncate:
                reason = "longer than max_length"
            elif not (pair.chosen and pair.rejected):
                reason = "truncation left a response empty"
            elif pair.chosen == pair.rejected and drop_identical:
                reason = "responses identical as tokens or after truncation"
            report.add(whole, pair, reason)
            if not reason:
                yield pair
    if not report.kept:
        reasons = ", ".join(dropped_lines(report.dropped, "record"))
        what = f"no pair is left to use with max_length = {max_length} ({reasons})"
        raise UserError(f"{what}; raise it or change the data")


def describe_pair(pair: TokenPair, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """Every token of a pair in the order in which it is laid out, prompt | chosen | rejected.

    Positions of rejected restart where the prompt ended, because it follows the prompt too. The EOS that ends
    a response has a role of its own, and is scored like the rest of the response.
    """
    for part in PARTS:
        ids, scored = getattr(pair, part), part != "prompt"
        for place, token in enumerate(ids):
            is_end = scored and place == len(ids) - 1 and token == tokenizer.eos_id
            yield {
                "role": "eos" if is_end else part,
                "position": place + scored * len(pair.prompt),
                "id": token,
                "piece": tokenizer.piece(token),  # A leading space may read "Ġ" or "▁".
                "scored": scored,
                "response": part if scored else None,
            }


def _cut(pair: TokenPair, prompt_limit: int, max_length: int, bos_id: int | None) -> TokenPair:
    """The pair with its prompt cut from the left, each response from the right."""
    prompt = pair.prompt
    if len(prompt) > prompt_limit:
        head = prompt[:1] if prompt[0] == bos_id else []
        prompt = head + prompt[len(prompt) - (prompt_limit - len(head)) :]
    rest = max_length - len(prompt)
    return pair._replace(prompt=prompt, chosen=pair.chosen[:rest], rejected=pair.rejected[:rest])
