"""What stands beside tokenizer.json in a model's directory: which token ends a text, and the chat template."""

from pathlib import Path
from typing import Any

from minidpo.errors import UserError, one_line
from minidpo.files import read_object

CONFIG, SPECIAL_TOKENS, CHAT_TEMPLATE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def find_eos(directory: Path, vocabulary: dict[str, int]) -> int:
    """EOS by the first of three files that names one. Raises `UserError` if none does, or names no token."""
    for file, key in (
        (directory / CONFIG, "eos_token"),
        (directory / SPECIAL_TOKENS, "eos_token"),
        (directory / "config.json", "eos_token_id"),
    ):
        named = _fields(file).get(key)
        named = named.get("content") if isinstance(named, dict) else named
        named = named[0] if isinstance(named, list) and named else named  # the others only stop generation
        if named is not None:
            eos_id = vocabulary.get(named) if isinstance(named, str) else named
            if type(eos_id) is not int or eos_id not in vocabulary.values():
                raise UserError(f"{file}: {key} {named!r} is not in tokenizer.json; name a token that is")
            return eos_id
    raise UserError(f"{directory / CONFIG}: no eos_token; name the token that ends a text")


def find_template(directory: Path | None) -> str | None:
    """The model's chat template: chat_template.jinja, which newer directories have, else tokenizer_config.json."""
    if directory is None:
        return None
    file = directory / CHAT_TEMPLATE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not text in UTF-8 ({one_line(error)}); fetch it again") from None
    named = _fields(directory / CONFIG).get("chat_template")
    if isinstance(named, list):  # several, each {"name": ..., "template": ...}
        named = next(
            (t.get("template") for t in named if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if named is not None and not isinstance(named, str):
        raise UserError(
            f"{directory / CONFIG}: chat_template is of type {type(named).__name__}; give a string"
        )
    return named


def special_tokens(directory: Path | None) -> dict[str, str]:
    """bos_token, eos_token and so on as text: chat templates write them by these names."""
    if directory is None:
        return {}
    named = _fields(directory / SPECIAL_TOKENS) | _fields(directory / CONFIG)
    texts = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in sorted(named.items())
        if key.endswith("_token")
    }
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _fields(file: Path) -> dict[str, Any]:
    """Those of a config file; none where there is no such file."""
    return read_object(file) if file.is_file() else {}
