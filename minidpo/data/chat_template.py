"""Messages to text: the model's own chat template, or one of two that are written out here.

    message     {"role": "user", "content": "..."}
    prompt      the messages so far, and the header under which the assistant's turn begins
    response    what the assistant's turn adds to that text, up to the EOS that closes it

`model` renders the `chat_template` of the model's directory as transformers does, in jinja2's sandbox,
because the template is a program that came with a download. Such a template writes BOS itself. `hh` and
`chatml` write none, so their text is tokenized like any other, with the special tokens that the tokenizer
adds.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from minidpo.data.records import BadRecord, check_characters
from minidpo.data.tokenizer_files import find_template, special_tokens
from minidpo.errors import UserError, one_line
from minidpo.files import fingerprint

Message = dict[str, Any]  # "role" and "content" are strings; a template may read other keys

_WAY_OUT = "write messages as template = 'hh' or 'chatml' (--data.template=hh, --template hh)"

# As in HH-RLHF's files. They know no system turn: what it says stands before the first speaker.
_HH_HEADERS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
_HH_ROLES = "the hh template takes user, assistant and one system message, the first"

# hh and chatml for other programs, as a trained model's directory has them. Here they work without jinja2.
_JINJA = {
    "hh": "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}"
    "{% else %}{{ raise_exception('" + _HH_ROLES + "') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}",
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}


class ChatTemplate:
    """How the messages of one model become text.

    kind: model, hh or chatml. form: hh or chatml, or the source of the model's own template; None if it has
    none. to_keep: the chat_template.jinja of a model
    that is trained on this; None if the directory has it already. identity: a fingerprint of all that
    `render` depends on (but for today's date, where a template asks for it).
    """

    def __init__(self, kind: str, directory: Path | None, eos: str, bos: str = "") -> None:
        """eos: the token that ends a text. bos: the one that the tokenizer puts before a text."""
        # hh and chatml leave BOS to the tokenizer; other programs tokenize the text of a template as it is.
        begin = f"{{{{ {json.dumps(bos)} }}}}" if bos else ""
        written_out = {name: begin + source for name, source in _JINJA.items()}
        own = find_template(directory) if kind == "model" and directory else None
        # A model that was trained on hh or chatml has that as its own template.
        self.kind = next((name for name, source in written_out.items() if source == own), kind)
        self.form = own if self.kind == "model" else self.kind
        self.to_keep = written_out.get(kind)
        self._directory, self._eos = directory, eos
        self._tokens = special_tokens(directory) if self.kind == "model" and directory else {}
        self.identity = fingerprint(self.kind, eos, self.form or "", json.dumps(self._tokens))

    def split(self, prompt: Sequence[Message], responses: Sequence[Message]) -> tuple[str, list[str]]:
        """The prompt's text with its generation prompt, and what each response, one message, adds to it.

        A response stops right after the EOS that closes its turn: templates like to go on with a newline,
        which the model would never get to write, because generation ends at EOS. Without an EOS all of it is
        kept, and the tokenizer adds one. Raises `BadRecord` if the template refuses the messages, or writes
        the whole conversation so that it does not begin with the prompt.
        """
        prompt_text = self.render(prompt, generation_prompt=True)
        texts = []
        for message in responses:
            conversation = self.render([*prompt, message], generation_prompt=False)
            if not conversation.startswith(prompt_text):
                raise _refused("the conversation as the template writes it does not begin with the prompt")
            response = conversation[len(prompt_text) :]
            head, eos, tail = response.rpartition(self._eos)
            texts.append(head + eos if eos and not tail.strip() else response)
        return prompt_text, texts

    def render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        """All messages as one text; with `generation_prompt`, the header of an assistant's turn ends it."""
        if self.kind == "hh":
            text = _hh(messages) + "\n\nAssistant:" * generation_prompt
        elif self.kind == "chatml":
            turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
            text = "".join(turns) + "<|im_start|>assistant\n" * generation_prompt
        else:
            given = {"messages": list(messages), "tools": None, "documents": None} | self._tokens
            template = self._template
            try:
                text = template.render(given, add_generation_prompt=generation_prompt)
            except Exception as error:  # The template is a program: it can fail in every way a program can.
                raise _refused(f"the chat template refuses the messages: {one_line(error)}") from None
        check_characters(text, "the text of the messages")  # A template may read more than role and content.
        return text

    @cached_property
    def _template(self) -> Any:
        """The compiled template, in an environment like that of transformers, for which it was written."""
        if self.form is None:
            nowhere = "no chat_template in tokenizer_config.json and no chat_template.jinja"
            raise UserError(f"{self._directory}: {nowhere}; {_WAY_OUT}")
        try:
            import jinja2
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox
        except ModuleNotFoundError:
            needs = "a model's chat template needs jinja2: pip install -e '.[chat]'"
            raise UserError(f"{needs}, or {_WAY_OUT}") from None

        class GenerationTag(Extension):
            """{% generation %} marks the assistant's words for a mask; the text is its body."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.Scope(body, lineno=line)

        def refuse(reason: str) -> None:
            raise jinja2.TemplateError(reason)

        extensions = [GenerationTag, loopcontrols]
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        # jinja2's own filter escapes <, > and & for HTML: a model would be shown \u003c.
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.form)
        except jinja2.TemplateError as error:
            raise UserError(f"{self._directory}: its chat template is not jinja ({error})") from None


def _hh(messages: Sequence[Message]) -> str:
    for number, message in enumerate(messages):
        if message["role"] not in _HH_HEADERS or (message["role"] == "system" and number > 0):
            raise _refused(f"message {number} has role {message['role']!r}; {_HH_ROLES}")
    return "".join(_HH_HEADERS[message["role"]] + message["content"] for message in messages)


def _refused(reason: str) -> BadRecord:
    return BadRecord(reason, f"; mend the record, or {_WAY_OUT}")
