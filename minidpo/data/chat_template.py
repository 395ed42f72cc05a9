"""Messages to text: by the model's own chat template, or by hh or chatml (jinja.py).

    message     {"role": "user", "content": "..."}; a template may read other keys, such as tool_calls
    prompt      the messages so far, and the header under which the assistant's turn begins
    response    what the assistant's turn adds to that text, up to the EOS that closes it; for a reward model
                all that it adds, because a reward is read at the end of the whole text

The model's own template writes BOS itself; hh and chatml do not, so their text is tokenized like any other.
"""

import json
import re
from collections.abc import Iterable, Sequence
from datetime import date
from functools import cached_property
from os.path import commonprefix
from typing import Any

from minidpo.data.bad_record import BadRecord, check_characters, printable
from minidpo.data.jinja import compiled, refused, written
from minidpo.data.messages import ASSISTANT, SPEAKERS, Given, Message, Turns, with_reasoning
from minidpo.data.tokenizer_files import find_template, special_tokens
from minidpo.errors import one_line
from minidpo.files import fingerprint
from minidpo.log import print0

_PROBE = "\ue000"  # a text that is the beginning of no other

_MARKER = re.compile(r"<[|｜][^<>|｜]+[|｜]>")  # such as <|im_start|>


class ChatTemplate:
    """How the messages of one model become text.

    kind: model, hh or chatml. form: hh or chatml, or the source of the model's own template; None if it has
    none. to_keep: the chat_template.jinja of a model that is trained on this; None if the directory has it
    already. identity: a fingerprint of all that `render` depends on. date: what a template that asks for the
    date is given; empty if this one does not. closes: whether a response ends as the template ends it, so
    that no EOS is appended. asked_for: whether it is used in place of the model's own.
    """

    def __init__(self, kind: str, tokenizer: Any, day: str = "") -> None:
        """tokenizer: the `Tokenizer` of the model. day: the date, as 2026-11-26; empty: today."""
        self._tokenizer, self.eos = tokenizer, tokenizer.piece(tokenizer.eos_id)
        directory, rewards = tokenizer.directory, tokenizer.rewards
        own = find_template(directory) if kind == "model" and directory else None
        # A model trained on hh or chatml has that as its own template, a reward model hh with an end.
        forms = written(tokenizer.bos), written(tokenizer.bos, self.eos)
        self.kind = next((name for form in forms for name, source in form.items() if source == own), kind)
        self.asked_for = kind != "model"
        self.closes = rewards and self.kind != "hh"
        self.form = own if self.kind == "model" else self.kind
        self._source = written("").get(self.kind, own) or ""
        of_model = directory if self.kind == "model" else None
        # Some models have another template for records with tools.
        self._with_tools = of_model and find_template(of_model, "tool_use") or self._source
        self._tokens = special_tokens(of_model) if of_model else {}
        self.to_keep = forms[rewards].get(self.kind) if self.asked_for or rewards else None
        self.date = (day or date.today().isoformat()) if self.reads("strftime_now") else ""
        parts = self.kind, self.eos, self._source, self._with_tools, json.dumps(self._tokens), self.date
        self.identity = fingerprint(*parts, str(self.closes))
        self._roles = set(SPEAKERS.values())  # those of which nothing needs saying
        self._date_is_told = self._markers_are_checked = False

    def reads(self, name: str) -> bool:
        """Whether the text of a message can depend on its key `name`, or on a variable of that name."""
        return name in self._source + self._with_tools

    def check_roles(self, messages: Iterable[Message]) -> None:
        """Tell once of each role that the template does not name, because many write any role, and a
        model knows a few. Raises `BadRecord` where it is another name of the user, assistant or system."""
        for role in (message["role"] for message in messages):
            if role not in self._roles and not (self.reads(f"'{role}'") or self.reads(f'"{role}"')):
                what = f"a message has the role {printable(repr(role))[:40]}"
                usual = SPEAKERS.get(role.lower())
                if usual in ("user", "assistant", "system"):
                    raise BadRecord(what, f", which the chat template does not name; call it {usual!r}")
                print0(f"warning: {what}, which the chat template does not name")
            self._roles.add(role)

    def tell_date(self) -> None:
        """Say once which date the template writes, if it writes one."""
        if self.date and not self._date_is_told:
            print0(f"the chat template writes the date, here {self.date}")
        self._date_is_told = True

    def split(
        self, prompt: Turns, responses: Sequence[Turns], given: Given | None = None
    ) -> tuple[str, list[str], str]:
        """The prompt's text with its generation prompt, what the messages of each response add to it, and
        the end of the generation prompt that was left out.

        A response stops right after the EOS that closes its turn, because generation ends there, though
        templates like to go on with a newline. Without an EOS all of it is kept, and the tokenizer adds one.
        Raises `BadRecord` if the template refuses the messages, or writes the whole conversation so that it
        does not begin with the prompt.
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
        self, prompt: Turns, responses: Sequence[Turns], conversations: Sequence[str], given: Given | None
    ) -> list[str]:
        """What the responses add to the prompt without its system turn, for templates (Mistral 7B v0.3, Nemo)
        that write it into the last message if that is a user turn: into a prompt, but not into a conversation
        with a response. Raises `BadRecord` unless the responses are written alike without it."""
        reason = "the conversation as the template writes it does not begin with the prompt"
        if len(prompt) < 2 or prompt[0]["role"] != "system":
            raise refused(reason)
        _, texts, left_out = self.split(prompt[1:], responses, given)
        for conversation, text in zip(conversations, texts, strict=True):
            if left_out or not conversation.rstrip().endswith(text.rstrip()):
                raise refused(f"{reason}; without its system turn it would")
        return texts

    def is_blank(self, prompt: Turns, response: Turns, text: str, given: Given | None = None) -> bool:
        """Whether the text of a response has no more of the assistant than is written for empty messages."""
        contents = ((m.get("content") or "").strip() for m in response if m["role"] == ASSISTANT)
        if any(content and content in text.removesuffix(self.eos) for content in contents):
            return False  # A second rendering is rarely needed.
        silent = {"role": ASSISTANT, "content": ""}
        emptied = [silent if message["role"] == ASSISTANT else message for message in response]
        try:
            _, (empty,), _ = self.split(prompt, [emptied], given)
        except BadRecord:
            empty = self.eos
        return "".join(text.split()) == "".join(empty.split())

    def render(self, messages: Turns, generation_prompt: bool, given: Given | None = None) -> str:
        """All messages as one text; with `generation_prompt`, the header of an assistant's turn ends it."""
        if self.kind != "model" and any(message.get("content") is None for message in messages):
            raise refused("a message has no text under 'content', and hh and chatml write nothing else")
        variables = {"tools": None, "documents": None} | self._tokens | dict(given or {})
        variables["messages"] = list(map(with_reasoning, messages))
        source = self._source if variables["tools"] is None else self._with_tools
        program = compiled(source, self._tokenizer.directory, self.date)
        try:
            text = program.render(variables, add_generation_prompt=generation_prompt)
        except Exception as error:  # The template is a program: it can fail in every way a program can.
            raise refused(f"the chat template refuses the messages: {one_line(error)}") from None
        check_characters(text, "the text of the messages")  # A template may read more than role and content.
        self.tell_date()
        if not self._markers_are_checked:
            # What else is in the text was written by a message.
            markers = [marker for marker in dict.fromkeys(_MARKER.findall(text)) if self.reads(marker)]
            if unknown := [marker for marker in markers if len(self._ids(marker)) != 1]:
                print0(f"warning: the tokenizer has no token for {', '.join(unknown)} of the chat template")
            self._markers_are_checked = True  # It is said once.
        return text

    def shared_begin(self, texts: Sequence[str]) -> str:
        """The longest beginning of all texts whose token ids are a beginning of the ids of each.

        The generation prompt of a reasoning model may go on, with "<think>", where the text of a response
        does not. One that begins with "<", too, must not move the cut into the middle of a token.
        """
        begin = commonprefix(texts)
        ids = list(map(self._ids, texts))
        while any(of_text[: len(cut)] != cut for cut in [self._ids(begin)] for of_text in ids):
            begin = begin[:-1]
        return begin

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

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
