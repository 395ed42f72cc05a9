"""Messages to text: the model's own chat template, or one of two that are written out here.

    message     {"role": "user", "content": "..."}; a template may read other keys, such as tool_calls
    prompt      the messages so far, and the header under which the assistant's turn begins
    response    what the assistant's turn adds to that text, up to the EOS that closes it; for a reward model
                all that it adds, because a reward is read at the end of the whole text

`model` renders the `chat_template` of the model's directory as transformers does, in jinja2's sandbox,
because the template is a program that came with a download. Such a template writes BOS itself. `hh` and
`chatml` write none, so their text is tokenized like any other, with the special tokens that the tokenizer
adds.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

from minidpo.data.jinja import compiled
from minidpo.data.messages import ASSISTANT, Given, Message, text_of, with_reasoning, words_of
from minidpo.data.records import BadRecord, check_characters
from minidpo.data.tokenizer_files import find_template, special_tokens
from minidpo.data.written_templates import in_jinja, refused, write
from minidpo.errors import one_line
from minidpo.files import fingerprint
from minidpo.log import print0

_PROBE = "\ue000"  # a text that is the beginning of no other

_MARKER = re.compile(r"<[|｜][^<>|｜]+[|｜]>")  # such as <|im_start|>


class ChatTemplate:
    """How the messages of one model become text.

    kind: model, hh or chatml. form: hh or chatml, or the source of the model's own template; None if it has
    none. to_keep: the chat_template.jinja of a model that is trained on this; None if the directory has it
    already. identity: a fingerprint of all that `render` depends on but the date. date: what a template that
    asks for the date is given; dated: whether one has asked. closes: whether a response ends as the template
    ends it, so that no EOS is appended. asked_for: whether it is used in place of the model's own.
    """

    def __init__(
        self,
        kind: str,
        directory: Path | None,
        eos: str,
        bos: str = "",
        day: str = "",
        rewards: bool = False,
        encode: Callable[[str], list[int]] = lambda text: [0],
    ) -> None:
        """eos: the token that ends a text. bos: the one that the tokenizer puts before a text. day: the date,
        as 2026-11-26; empty: today. rewards: of a reward model. encode: ids of a text."""
        own = find_template(directory) if kind == "model" and directory else None
        # A model that was trained on hh or chatml has that as its own template, a reward model hh with an
        # end.
        forms = in_jinja(bos), in_jinja(bos, eos)
        self.kind = next((name for form in forms for name, source in form.items() if source == own), kind)
        self.asked_for = kind != "model"
        self.closes = rewards and self.kind != "hh"
        self._encode, self._markers_are_checked = encode, False
        self.form = own if self.kind == "model" else self.kind
        of_model = directory if self.kind == "model" else None
        # Some models have another template for records with tools.
        self._with_tools = find_template(of_model, "tool_use") if of_model else None
        self._tokens = special_tokens(of_model) if of_model else {}
        self.to_keep = forms[rewards].get(self.kind) if self.asked_for or rewards else None
        self.date, self.dated = day or date.today().isoformat(), False
        self._directory, self.eos = directory, eos
        sources = (self.form or "", self._with_tools or "")
        self.identity = fingerprint(self.kind, eos, *sources, json.dumps(self._tokens), str(self.closes))
        self._compiled: dict[str | None, Any] = {}

    def reads(self, name: str) -> bool:
        """Whether the text of a message can depend on its key `name`, or on a variable of that name."""
        if self.kind != "model":
            return name in ("role", "content")
        return name in (self.form or "") + (self._with_tools or "")

    def tell_date(self) -> None:
        """Say once that the template writes the date, and which one it is given."""
        if not self.dated:
            print0(f"the chat template writes the date, here {self.date}")
        self.dated = True

    def split(
        self, prompt: Sequence[Message], responses: Sequence[Sequence[Message]], given: Given | None = None
    ) -> tuple[str, list[str], str]:
        """The prompt's text with its generation prompt, what the messages of each response add to it, and
        the end of the generation prompt that was left out.

        A response stops right after the EOS that closes its turn: templates like to go on with a newline,
        which the model would never get to write, because generation ends at EOS. Without an EOS all of it is
        kept, and the tokenizer adds one. Raises `BadRecord` if the template refuses the messages, or writes
        the whole conversation so that it does not begin with the prompt.
        """
        asked = self.render(prompt, True, given)
        conversations = [self.render([*prompt, *response], False, given) for response in responses]
        begin = asked
        if not all(text.startswith(asked) for text in conversations):
            begin = self.shared_begin([asked, *conversations])
            if not begin.startswith(self.render(prompt, False, given)):
                return asked, self._without_system(prompt, responses, conversations, given), ""
        texts = [conversation[len(begin) :] for conversation in conversations]
        return begin, texts if self.closes else list(map(self.to_eos, texts)), asked[len(begin) :]

    def _without_system(
        self,
        prompt: Sequence[Message],
        responses: Sequence[Sequence[Message]],
        conversations: Sequence[str],
        given: Given | None,
    ) -> list[str]:
        """What the responses add to the prompt without its system turn.

        Some templates (Mistral 7B v0.3, Nemo) write the system turn into the last message if that is a user
        turn, so they write it when a response is asked for, and drop it from a conversation that has one.
        Raises `BadRecord` unless the responses are written alike without it.
        """
        reason = "the conversation as the template writes it does not begin with the prompt"
        if len(prompt) < 2 or prompt[0]["role"] != "system":
            raise refused(reason)
        _, texts, left_out = self.split(prompt[1:], responses, given)
        for conversation, text in zip(conversations, texts, strict=True):
            if left_out or not conversation.rstrip().endswith(text.rstrip()):
                raise refused(f"{reason}; without its system turn it would")
        return texts

    def is_blank(
        self, prompt: Sequence[Message], response: Sequence[Message], text: str, given: Given | None = None
    ) -> bool:
        """Whether the text of a response holds no more of the assistant than the template writes for empty
        messages."""
        own = [message for message in response if message["role"] == ASSISTANT]
        if any(word in text.removesuffix(self.eos) for message in own for word in words_of(message)):
            return False  # A second rendering is rarely needed.
        silent = {"role": ASSISTANT, "content": ""}
        emptied = [silent if message["role"] == ASSISTANT else message for message in response]
        try:
            _, (empty,), _ = self.split(prompt, [emptied], given)
        except BadRecord:
            empty = self.eos
        return "".join(text.split()) == "".join(empty.split())

    def render(self, messages: Sequence[Message], generation_prompt: bool, given: Given | None = None) -> str:
        """All messages as one text; with `generation_prompt`, the header of an assistant's turn ends it."""
        if self.kind != "model":
            text = write(self.kind, messages, generation_prompt)
        else:
            if any(isinstance(m.get("content"), list) for m in messages) and not self._takes_parts:
                messages = [m | {"content": text_of(m)} if "content" in m else m for m in messages]
            text = self._run(messages, generation_prompt, given)
        check_characters(text, "the text of the messages")  # A template may read more than role and content.
        if not self._markers_are_checked:
            own = in_jinja("")["chatml"] if self.kind == "chatml" else self.form or ""
            # What else is in the text was written by a message.
            markers = [marker for marker in dict.fromkeys(_MARKER.findall(text)) if marker in own]
            if unknown := [marker for marker in markers if len(self._encode(marker)) != 1]:
                print0(f"warning: the tokenizer has no token for {', '.join(unknown)} of the chat template")
            self._markers_are_checked = True  # It is said once.
        return text

    def shared_begin(self, texts: Sequence[str]) -> str:
        """The longest beginning of all texts whose token ids are a beginning of the ids of each.

        The generation prompt of a reasoning model may go on, with "<think>", where the text of a given
        response does not. A response that begins with "<", too, must not move the cut into the middle of a
        token.
        """
        begin = commonprefix(texts)
        ids = list(map(self._encode, texts))
        while any(of_text[: len(cut)] != cut for cut in [self._encode(begin)] for of_text in ids):
            begin = begin[:-1]
        return begin

    def to_eos(self, turn: str) -> str:
        """The text of a turn up to the EOS that closes it; all of it if none does."""
        head, eos, tail = turn.rpartition(self.eos)
        return head + eos if eos and not tail.strip() else turn

    @cached_property
    def tail(self) -> str | None:
        """What follows the content of a response in its text; None if that is the tokenizer's EOS alone."""
        if self.kind == "hh":
            return None
        turns = ("user", "assistant")
        text = self.render([{"role": role, "content": _PROBE} for role in turns], generation_prompt=False)
        return text.rpartition(_PROBE)[2]

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads content that is a list of parts, and does not fail or print it."""
        content = [{"type": "text", "text": _PROBE}]
        try:
            text = self._run([{"role": "user", "content": content}], False)
        except BadRecord:
            return False
        return _PROBE in text and str(content) not in text

    def _run(self, messages: Sequence[Message], generation_prompt: bool, given: Given | None = None) -> str:
        """What the model's own template makes of messages, with the variables that transformers gives it."""
        variables = {"tools": None, "documents": None} | self._tokens | dict(given or {})
        variables["messages"] = list(map(with_reasoning, messages))
        source = self.form if variables["tools"] is None else self._with_tools or self.form
        if source not in self._compiled:
            self._compiled[source] = compiled(source, self._directory, self.date, self.tell_date)
        template = self._compiled[source]
        try:
            return template.render(variables, add_generation_prompt=generation_prompt)
        except Exception as error:  # The template is a program: it can fail in every way a program can.
            raise refused(f"the chat template refuses the messages: {one_line(error)}") from None
