"""The templates hh and chatml: written out, so that they need no jinja2, and in jinja for other programs."""

import json
from collections.abc import Sequence

from minidpo.data.messages import Message, text_of
from minidpo.data.records import BadRecord

WAY_OUT = "write messages as template = 'hh' or 'chatml' (--data.template=hh, --template hh)"

# As in HH-RLHF's files. They know no system turn: what it says stands before the first speaker.
_HH_HEADERS = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
_HH_ROLES = "the hh template takes user, assistant and one system message, the first"

_END = "@end@"
_JINJA = {
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


def in_jinja(bos: str, eos: str = "") -> dict[str, str]:
    """hh and chatml as a trained model's directory has them. bos: written first, because other programs
    tokenize the text of a template as it is. eos: where hh, which has no end, is to write one."""
    begin = f"{{{{ {json.dumps(bos)} }}}}" if bos else ""
    last = "{% if loop.last and not add_generation_prompt %}"
    end = f"{last}{{{{ {json.dumps(eos)} }}}}{{% endif %}}" if eos else ""
    return {name: begin + source.replace(_END, end) for name, source in _JINJA.items()}


def write(kind: str, messages: Sequence[Message], generation_prompt: bool) -> str:
    """Messages as hh or chatml, the `kind`."""
    if kind == "chatml":
        turns = [f"<|im_start|>{message['role']}\n{_text(message)}<|im_end|>\n" for message in messages]
        return "".join(turns) + "<|im_start|>assistant\n" * generation_prompt
    for number, message in enumerate(messages):
        if message["role"] not in _HH_HEADERS or (message["role"] == "system" and number > 0):
            raise refused(f"message {number} has role {message['role']!r}; {_HH_ROLES}")
    text = "".join(_HH_HEADERS[message["role"]] + _text(message) for message in messages)
    return text + "\n\nAssistant:" * generation_prompt


def refused(reason: str) -> BadRecord:
    return BadRecord(reason, f"; mend the record, or {WAY_OUT}")


def _text(message: Message) -> str:
    text = text_of(message)
    if text is None:
        raise refused("a message has no text under 'content', and hh and chatml write nothing else")
    return text
