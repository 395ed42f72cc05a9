"""The files beside tokenizer.json in a model's directory: which token ends a text, and the chat template."""

from pathlib import Path
from typing import Any

from minidpo.errors import UserError, one_line
from minidpo.files import read_object

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"


def find_eos(directory: Path, vocabulary: dict[str, int]) -> int:
    """EOS by the first of three files that names one. Raises `UserError` if none does, or names no token."""
    for name, key in ((CONFIG, "eos_token"), (SPECIAL_TOKENS, "eos_token"), ("config.json", "eos_token_id")):
        eos = _text(_fields(directory / name).get(key))
        eos = eos[0] if isinstance(eos, list) and eos else eos  # The others only stop generation.
        if eos is not None:
            eos_id = vocabulary.get(eos) if isinstance(eos, str) else eos
            if type(eos_id) is not int or eos_id not in vocabulary.values():
                raise UserError(f"{directory / name}: {key} {eos!r} is not in tokenizer.json; name another")
            return eos_id
    raise UserError(f"{directory / CONFIG}: no eos_token; name the token that ends a text")


def find_template(directory: Path) -> str | None:
    """The model's chat template: chat_template.jinja (newer directories), else tokenizer_config.json's."""
    file = directory / CHAT_TEMPLATE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not text in UTF-8 ({one_line(error)}); fetch it again") from None
    template = _fields(directory / CONFIG).get("chat_template")
    if isinstance(template, list):  # several, each {"name": ..., "template": ...}
        named = (each for each in template if isinstance(each, dict) and each.get("name") == "default")
        template = next(named, {}).get("template")
    if not isinstance(template, str | None):
        raise UserError(
            f"{directory / CONFIG}: chat_template is of type {type(template).__name__}; give a string"
        )
    return template


def special_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token and so on as text: chat templates write them by these names."""
    fields = sorted((_fields(directory / SPECIAL_TOKENS) | _fields(directory / CONFIG)).items())
    tokens = {key: _text(value) for key, value in fields if key.endswith("_token")}
    return {key: text for key, text in tokens.items() if isinstance(text, str)}


def _text(token: Any) -> Any:
    """A token may be written with its options: {"content": "</s>", "lstrip": false}."""
    return token.get("content") if isinstance(token, dict) else token


def _fields(file: Path) -> dict[str, Any]:
    """Those of a config file; none if there is no such file."""
    return read_object(file) if file.is_file() else {}
