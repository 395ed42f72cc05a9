"""Chat templates are programs for jinja2: how they are compiled, and two that are no model's own."""

import json
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from minidpo.data.bad_record import BadRecord
from minidpo.errors import UserError, one_line

_WAY_OUT = "write messages as template = 'hh' or 'chatml' (--data.template=hh, --template hh)"
_HH_ROLES = "the hh template takes user, assistant and one system message, the first"
_END = "@end@"

# hh is as in HH-RLHF's files, which know no system turn: what it says stands before the first speaker.
_WRITTEN = {
    "hh": "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}"
    + _END
    + f"{{% else %}}{{{{ raise_exception('{_HH_ROLES}') }}}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}",
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}


def written(bos: str, eos: str = "") -> dict[str, str]:
    """hh and chatml as a trained model's directory has them. bos: written first, because other programs
    tokenize the text of a template as it is. eos: where hh, which has no end, is to write one."""
    begin = f"{{{{ {json.dumps(bos)} }}}}" if bos else ""
    last = "{% if loop.last and not add_generation_prompt %}"
    end = f"{last}{{{{ {json.dumps(eos)} }}}}{{% endif %}}" if eos else ""
    return {name: begin + source.replace(_END, end) for name, source in _WRITTEN.items()}


@cache
def compiled(source: str, directory: Path | None, date: str) -> Any:
    """The template in `source`, in an environment like that of transformers, but in jinja2's sandbox: it is a
    program that came with a download. directory: for error messages. date: what a template that asks for it
    is given. Raises `UserError` without a template, without jinja2, and for what is no template."""
    if not source:
        nowhere = "no chat_template in tokenizer_config.json and no chat_template.jinja"
        raise UserError(f"{directory}: {nowhere}; {_WAY_OUT}")
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox
    except ModuleNotFoundError:
        raise UserError("a chat template needs jinja2: pip install -e '.[chat]'") from None

    class GenerationTag(Extension):
        """{% generation %} marks the assistant's words for a mask; the text is its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    # jinja2's own filter escapes <, > and & for HTML: a model would be shown \u003c.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.fromisoformat(date).strftime(form)
    try:
        return environment.from_string(source)
    except Exception as error:  # jinja2 compiles to Python, which has limits and errors of its own.
        what = f"its chat template is not jinja ({one_line(error)})"
        raise UserError(f"{directory}: {what}; {_WAY_OUT}") from None


def refused(reason: str) -> BadRecord:
    return BadRecord(reason, f"; mend the record, or {_WAY_OUT}")
