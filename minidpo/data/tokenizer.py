"""Text to token ids, and pairs of texts to pairs of ids.

prompt ids      what the tokenizer makes of the prompt alone: the model is asked with exactly these
response ids    what prompt + response adds to them, then EOS, once
boundary        where the two meet; a tokenizer may merge characters from both sides into one token
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path

import tokenizers

from minidpo.data.chat_template import ChatTemplate
from minidpo.data.messages import Prompt
from minidpo.data.pair_tokens import TokenPair
from minidpo.data.preferences import PreferencePair
from minidpo.data.tokenizer_files import GENERATION, add_named_tokens, fields_of, find_eos
from minidpo.data.turns import others_in_tokens
from minidpo.errors import UserError, one_line
from minidpo.files import fingerprint, require_model_file


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows where text ends.

    eos_id: the token that ends a text. bos_id: the one that `encode` puts before every text, if any; bos: it
    as text, else empty. vocab_size: the highest id + 1. rowless: ids of named tokens beyond the model's rows;
    no text may hold them. rewards: of a reward model, which reads messages to the end of the chat template's
    text.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        eos_id: int,
        directory: Path | None = None,
        rowless: frozenset[int] = frozenset(),
        rewards: bool = False,
    ) -> None:
        core.no_truncation()
        core.no_padding()
        self._core, self.directory, self._rowless = core, directory, rowless
        self.eos_id, self.rewards = eos_id, rewards
        probe = core.encode("a")
        added = probe.special_tokens_mask
        self.bos_id: int | None = probe.ids[0] if added[:1] == [1] else None
        self.bos = "" if self.bos_id is None else self.piece(self.bos_id)
        # What the post-processor puts behind every text, such as EOS: the number of such tokens.
        self._behind = added[::-1].index(0) if 0 in added else 0
        self.vocab_size = max({*core.get_vocab(with_added_tokens=True).values()} - rowless) + 1

    @classmethod
    def from_pretrained(cls, path: str | Path, rewards: bool = False) -> "Tokenizer":
        """Load tokenizer.json of a Hugging Face directory, and its EOS from the configs beside it. Raises
        `UserError` if tokenizer.json is missing or broken, or no EOS of its vocabulary is named."""
        path = Path(path)
        file = require_model_file(path, "tokenizer.json", "a model directory with a fast tokenizer has one")
        try:
            core = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8-sig"))
            own, rows = max(core.get_vocab().values()) + 1, fields_of(path / "config.json").get("vocab_size")
            add_named_tokens(core, path)
            vocabulary = core.get_vocab()
            # Many a pad token is named and never trained: that is no fault until a text holds it.
            rowless = {i for i in vocabulary.values() if type(rows) is int and i >= max(own, rows)}
            eos_id = find_eos(path, {text: i for text, i in vocabulary.items() if i not in rowless})
            return cls(core, eos_id, path, frozenset(rowless), rewards)
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # The library's panics are no Exception.
            raise UserError(f"{file}: not a tokenizer ({one_line(error)}); fetch it again") from None

    def chat_template(self, kind: str = "model", day: str = "") -> ChatTemplate:
        """How messages become text for this tokenizer; kind: model, hh or chatml; day: see ChatTemplate."""
        return ChatTemplate(kind, self, day)

    @cached_property
    def identity(self) -> str:
        """A fingerprint: equal for tokenizers that give every text the same ids."""
        return fingerprint(tokenizers.__version__, self._core.to_str(), str(self.eos_id))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens at which generation ends: EOS, and others that the model's configuration names."""
        names = ("config.json", GENERATION) if self.directory else ()
        named = [fields_of(Path(self.directory or "", name)).get("eos_token_id") for name in names]
        ids = (i for each in named for i in (each if isinstance(each, list) else [each]))
        return frozenset([self.eos_id, *(i for i in ids if type(i) is int)])

    def conflict(self, other: "Tokenizer") -> str:
        """Where the ids of one tokenizer are other tokens to the other; empty if they are the same to both.
        One of them may know more tokens, and spell a special one differently: chat models name reserved ones.
        """
        ours, theirs = (dict(sorted(each._core.get_vocab().items())) for each in (self, other))
        for token, i in ours.items():
            if theirs.get(token, i) != i and i not in self._rowless and theirs[token] not in other._rowless:
                return f"{token!r} is {i} in one and {theirs[token]} in the other"
        spelled = {i: token for token, i in theirs.items()}
        special = {*self.special_ids.values(), *other.special_ids.values(), *self._rowless, *other._rowless}
        for token, i in ours.items():
            if spelled.get(i, token) != token and i not in special:
                return f"{i} is {token!r} in one and {spelled[i]!r} in the other"
        return ""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; add_special_tokens: with BOS, if the tokenizer puts it before texts and it is not in
        this one. What it puts behind a text (EOS) is left out, because a prompt goes on."""
        return self._ids(self._core.encode(text, add_special_tokens=add_special_tokens), add_special_tokens)

    def _ids(self, encoding: tokenizers.Encoding, add_special_tokens: bool) -> list[int]:
        ids = encoding.ids
        if add_special_tokens:
            ids = ids[: len(ids) - self._behind]
            ids = ids[1:] if ids[:2] == [self.bos_id] * 2 else ids
        if not self._rowless.isdisjoint(ids):
            what = f"a text holds {self.piece(min(self._rowless.intersection(ids)))!r}"
            right = "for which the model has no row; name no such token, or resize the embedding"
            raise UserError(f"{self.directory}: {what}, {right}")
        return ids

    @property
    def special_ids(self) -> dict[str, int]:
        """The special tokens and their ids."""
        added = self._core.get_added_tokens_decoder().items()
        return {token.content: i for i, token in added if token.special}

    @property
    def next_id(self) -> int:
        """The id that a new token would get."""
        return self._core.get_vocab_size(with_added_tokens=True)

    def save(self, file: Path, new: Sequence[str] = ()) -> None:
        """Write a tokenizer.json that lists all special tokens, those named beside it and `new` ones too."""
        self._core.add_special_tokens(list(new))
        self._core.save(str(file))

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        return self._core.decode(ids, skip_special_tokens=not special_tokens)

    def piece(self, token: int) -> str:
        """One id as the vocabulary spells it; empty for an id that it does not have."""
        return self._core.id_to_token(token) or ""

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt.text, prompt.add_special_tokens)

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """What `encode` makes `ids` of: special tokens are written out, but for the BOS that it adds itself.
        If `ids` are a prompt that lost its beginning, the first token may come out as another."""
        added = list(ids[:1]) == [self.bos_id]
        rest = ids[1:] if added else ids
        whole = Prompt(self.decode(rest, True), add_special_tokens=added or self.bos_id is None)
        # Tokenizers that put a space before a text also put one behind each token that is cut out of a text
        # beforehand, and decoding takes only the first space away.
        tokens = self._core.get_added_tokens_decoder().items()
        apart = {i for i, token in tokens if not token.normalized}
        parts = (
            "".join(map(self.piece, part)) if is_apart else self.decode([*part], True)
            for is_apart, part in groupby(rest, key=apart.__contains__)
        )
        in_parts = whole._replace(text="".join(parts))
        return in_parts if self.prompt_ids(in_parts) == list(ids) else whole

    def encode_responses(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[str]]
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Ids of each prompt, and of each of its responses by the boundary rule; on all threads. A response
        ends with the prompt's tail, or with EOS where it has none. A prompt may come out empty."""
        prompt_ids: list[list[int]] = []
        response_ids: list[list[list[int]]] = []
        both = zip(prompts, responses, strict=True)
        # The library takes one value of add_special_tokens per call.
        for add_special_tokens, group in groupby(both, key=lambda each: each[0].add_special_tokens):
            alike = [(prompt, [text + (prompt.tail or "") for text in its]) for prompt, its in group]
            texts = [prompt.text + text for prompt, its in alike for text in ("", *its)]
            encodings = self._core.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
            ids = (self._ids(encoding, add_special_tokens) for encoding in encodings)
            for prompt, its in alike:
                prompt_ids.append(next(ids))
                response_ids.append([self._response(prompt_ids[-1], next(ids), text) for text in its])
                for response in response_ids[-1] if prompt.tail is None else ():
                    response += [self.eos_id] if response[-1:] != [self.eos_id] else []
        return prompt_ids, response_ids

    def _response(self, prompt: list[int], joint: list[int], text: str) -> list[int]:
        """The boundary rule. joint: the ids of prompt + response, tokenized as one text. If the tokenizer
        merged across the boundary, they do not begin with the ids that the model is asked with, and the
        response has to be tokenized alone."""
        if joint[: len(prompt)] == prompt:
            return joint[len(prompt) :]
        # Some tokenizers (Llama 2, Mistral) would put a space before it. That goes before a character here,
        # which is then cut off.
        for neutral in "\n." if self.prepends else "":
            encoding = self._core.encode(neutral + text, add_special_tokens=False)
            if all(end <= 1 or start >= 1 for start, end in encoding.offsets):
                both = zip(encoding.ids, encoding.offsets, strict=True)
                return [token for token, (start, _) in both if start >= 1]
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def prepends(self) -> bool:
        """Whether a text gets something at its beginning that it would not get elsewhere."""
        first = self.encode("a", add_special_tokens=False)
        return self.encode("\na", add_special_tokens=False)[-len(first) :] != first

    def encode_pairs(self, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
        """`encode_responses` of their responses, and which of the tokens others wrote."""
        prompts = [Prompt(p.prompt, add_special_tokens=p.add_special_tokens, tail=p.tail) for p in pairs]
        encoded = self.encode_responses(prompts, [pair.responses for pair in pairs])
        ids = []
        for pair, prompt, its in zip(pairs, *encoded, strict=True):
            both = zip(pair.responses, its, pair.others, strict=False)
            unscored = tuple(others_in_tokens(self._core, pair.prompt, *each) for each in both)
            source = pair.index, pair.margin, pair.file, pair.messages, pair.label
            rejected = its[1] if len(its) > 1 else None
            ids.append(TokenPair(prompt, its[0], rejected, *source, unscored if any(unscored) else ()))
        return ids
