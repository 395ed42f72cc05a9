"""The model's own chat template as a program: jinja2's sandbox, with what transformers has in it."""

import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from minidpo.data.written_templates import WAY_OUT
from minidpo.errors import UserError, one_line


def compiled(source: str | None, directory: Path | None, date: str, on_date: Callable[[], None]) -> Any:
    """The template in `source`, in an environment like that of transformers, for which it was written.

    directory: for error messages. date: what a template that asks for it is given; then on_date is called.
    Raises `UserError` without a template, without jinja2, and for what is no template.
    """
    if source is None:
        nowhere = "no chat_template in tokenizer_config.json and no chat_template.jinja"
        raise UserError(f"{directory}: {nowhere}; {WAY_OUT}")
    try:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment as Sandbox
    except ModuleNotFoundError:
        needs = "a model's chat template needs jinja2: pip install -e '.[chat]'"
        raise UserError(f"{needs}, or {WAY_OUT}") from None

    class GenerationTag(Extension):
        """{% generation %} marks the assistant's words for a mask; the text is its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def strftime_now(form: str) -> str:
        on_date()
        return datetime.fromisoformat(date).strftime(form)

    extensions = [GenerationTag, loopcontrols]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    # jinja2's own filter escapes <, > and & for HTML: a model would be shown \u003c.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(source)
    except Exception as error:  # jinja2 compiles to Python, which has limits and errors of its own.
        what = f"its chat template is not jinja ({one_line(error)})"
        raise UserError(f"{directory}: {what}; {WAY_OUT}") from None
