"""Messages to text: the model's own chat template, or one of two that are written out here.

    message     {"role": "user", "content": "..."}
    prompt      the messages so far, and the header under which the assistant's turn begins
    ending      what the assistant's turn adds to that text, up to the EOS that closes it

`model` renders the `chat_template` of the model's directory as transformers does, in jinja2's sandbox, for the
template is a program that came with a download. Such a template writes BOS itself. `hh` and `chatml` write none,
so their text is tokenized like any other, with the special tokens the tokenizer adds.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from minidpo.errors import UserError
from minidpo.files import fingerprint
from minidpo.tokenizer_files import find_template, special_tokens

Message = dict[str, Any]  # "role" and "content" are strings; a template may read other keys
Render = Callable[[Sequence[Message], bool], str]  # messages, generation_prompt -> text

TEMPLATES = ("model", "hh", "chatml")

_HH_SPEAKERS = {"user": "Human", "assistant": "Assistant"}

# The same two for other programs, as what is trained leaves them beside its weights.
_JINJA = {
    "hh": "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}"
    "{% else %}{{ raise_exception('the hh template takes user, assistant and one system message, the first') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}",
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}


class TemplateError(ValueError):
    """Messages that a template does not take: the message says why."""


class ChatTemplate:
    """kind: one of TEMPLATES. directory: the model's. eos: what ends a text; bos: what its tokenizer puts before one."""

    def __init__(self, kind: str, directory: Path | None, eos: str, bos: str = "") -> None:
        self._asked, self._directory, self._bos, self._eos = kind, directory, bos, eos

    @cached_property
    def kind(self) -> str:
        """One of TEMPLATES; a model that was trained on hh or chatml has that for its own."""
        source = find_template(self._directory) if self._asked == "model" else None
        return next((kind for kind in _JINJA if source == self._jinja(kind)), self._asked)

    @cached_property
    def form(self) -> str | None:
        """hh or chatml, or the source of the model's own; None where it has none."""
        return find_template(self._directory) if self.kind == "model" else self.kind

    @property
    def to_keep(self) -> str | None:
        """A chat_template.jinja for what is trained on this; None where that is the model's already."""
        return None if self._asked == "model" else self._jinja(self._asked)

    def _jinja(self, kind: str) -> str:
        """BOS, which hh and chatml leave to the tokenizer, written out: others tokenize what a template wrote as it is."""
        return (f"{{{{ {json.dumps(self._bos)} }}}}" if self._bos else "") + _JINJA[kind]

    @property
    def writes_special_tokens(self) -> bool:
        """Whether the text is complete: a tokenizer that adds BOS to it would put a second one."""
        return self.kind == "model"

    @cached_property
    def identity(self) -> str:
        """A fingerprint of all that `render` depends on, but for a template that asks for today's date."""
        return fingerprint(self.kind, self._eos, self.form or "", json.dumps(special_tokens(self._directory)))

    def split(self, prompt: Sequence[Message], endings: Sequence[Message]) -> tuple[str, list[str]]:
        """The prompt's text with its generation prompt, and what each ending's one message adds to it.

        An ending stops right after the EOS that closes its turn: templates like to go on with a newline, which
        the model would never get to write, for generation ends at EOS. Without an EOS all is kept, and the
        tokenizer adds one. Raises `TemplateError` where the template refuses the messages, or writes the whole
        conversation so that it does not begin with the prompt.
        """
        prompt_text = self.render(prompt, generation_prompt=True)
        texts = []
        for message in endings:
            whole = self.render([*prompt, message], generation_prompt=False)
            if not whole.startswith(prompt_text):
                raise TemplateError(
                    "the conversation as the template writes it does not begin with the prompt as it writes it"
                )
            ending = whole[len(prompt_text) :]
            head, eos, tail = ending.rpartition(self._eos)
            texts.append(head + eos if eos and not tail.strip() else ending)
        return prompt_text, texts

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """All messages as one text; `generation_prompt`: and then the header of an assistant's turn."""
        return self._render(messages, generation_prompt)

    @cached_property
    def _render(self) -> Render:
        if self.kind == "hh":
            return _hh
        if self.kind == "chatml":
            return _chatml
        if self.form is None:
            raise UserError(
                f"{self._directory}: no chat_template in tokenizer_config.json and no chat_template.jinja;"
                " messages can be written as template = 'hh' or 'chatml' (--data.template=hh; for commands --template hh)"
            )
        return _compile(self.form, special_tokens(self._directory), self._directory)


def _hh(messages: Sequence[Message], generation_prompt: bool) -> str:
    """As in HH-RLHF's files, which know no system turn: what it says stands before the first speaker."""
    text = ""
    for place, message in enumerate(messages):
        if message["role"] == "system" and place == 0:
            text += message["content"]
        elif message["role"] in _HH_SPEAKERS:
            text += f"\n\n{_HH_SPEAKERS[message['role']]}: {message['content']}"
        else:
            raise TemplateError(
                f"message {place} has role {message['role']!r}; the hh template takes user, assistant"
                " and one system message, the first"
            )
    return text + "\n\nAssistant:" * generation_prompt


def _chatml(messages: Sequence[Message], generation_prompt: bool) -> str:
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages]
    return "".join(turns) + "<|im_start|>assistant\n" * generation_prompt


def _compile(source: str, tokens: dict[str, str], directory: Path | None) -> Render:
    """The template as a function. Templates are written for transformers' environment, so this one has the same
    options, filter, globals and tags."""
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        raise UserError(
            "a model's chat template needs jinja2: pip install -e '.[chat]'"
            " (or write messages as template = 'hh' or 'chatml')"
        ) from None

    class GenerationTag(Extension):
        """{% generation %} marks the assistant's words for other libraries' masks; the text is its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def to_json(value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja2's own filter escapes <, > and & for HTML: a model would be shown \u003c.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"{directory}: its chat template is not jinja ({error}); fetch it again") from None

    def render(messages: Sequence[Message], generation_prompt: bool) -> str:
        try:
            return template.render(
                **tokens,
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=generation_prompt,
            )
        except Exception as error:  # the template is a program: it can fail in every way a program can
            raise TemplateError(f"the chat template refuses the messages: {error}") from None

    return render
