"""The files beside tokenizer.json in a model's directory: special tokens, EOS, and the chat template."""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from minidpo.errors import UserError, one_line
from minidpo.files import read_object

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"  # of older directories, whose tokenizer.json has them too
CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # where transformers 5 saves all but the default one
GENERATION = "generation_config.json"

# In this order transformers adds them to a tokenizer, so it decides their ids.
_NAMES = [f"{name}_token" for name in "bos eos unk sep pad cls mask".split()]


def add_named_tokens(core: tokenizers.Tokenizer, directory: Path) -> None:
    """Add the special tokens that only the files beside tokenizer.json name, as transformers does: a token of
    the vocabulary keeps its id, and any other gets the next free one, whatever id the files give."""
    config = fields_of(directory / CONFIG)
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):  # Only older directories need the other file.
        listed, config = {}, fields_of(directory / SPECIAL_TOKENS) | config
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = [key for key in config if key.endswith("_token") and key not in _NAMES]
    named = [config.get(key) for key in (*_NAMES, *others)]
    for tokens in (extra, config.get("model_specific_special_tokens")):
        named += tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else []
    special = {token.content: token for token in map(_special, named) if token}

    own = core.get_added_tokens_decoder().values()
    known = {repr(token) for token in own}
    by_id = (AddedToken(**listed[index]) for index in sorted(listed, key=int))
    new = [token for token in by_id if repr(token) not in known]
    for token in new:
        token.special = token.special or token.content in special
    there = {token.content for token in (*own, *new)}
    core.add_tokens([*new, *(token for text, token in special.items() if text not in there)])


def prefix_space(directory: Path) -> bool | None:
    """Whether transformers puts a space before a text because tokenizer_config.json says so; None where
    tokenizer.json alone decides."""
    config = fields_of(directory / CONFIG)
    decides = str(config.get("tokenizer_class")).startswith(("GPT2Tokenizer", "LlamaTokenizer"))
    given = config.get("add_prefix_space")
    return given if decides and isinstance(given, bool) else None


def find_eos(directory: Path, vocabulary: dict[str, int]) -> int:
    """EOS by the first of three files that names one. Raises `UserError` if none does, or names no token."""
    for name, key in ((CONFIG, "eos_token"), (SPECIAL_TOKENS, "eos_token"), ("config.json", "eos_token_id")):
        eos = _text(fields_of(directory / name).get(key))
        eos = eos[0] if isinstance(eos, list) and eos else eos  # The others only stop generation.
        if eos is not None:
            eos_id = vocabulary.get(eos) if isinstance(eos, str) else eos
            if type(eos_id) is not int or eos_id not in vocabulary.values():
                raise UserError(f"{directory / name}: {key} {eos!r} is not in tokenizer.json; name another")
            return eos_id
    raise UserError(f"{directory / CONFIG}: no eos_token; name the token that ends a text")


def find_template(directory: Path, name: str = "default") -> str | None:
    """The model's chat template: chat_template.jinja (newer directories), else tokenizer_config.json's. name:
    which of several."""
    more = directory / MORE_TEMPLATES / f"{name}.jinja"
    file = more if name != "default" and more.is_file() else directory / CHAT_TEMPLATE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not text in UTF-8 ({one_line(error)}); fetch it again") from None
    template = fields_of(directory / CONFIG).get("chat_template")
    if isinstance(template, list):  # several, each {"name": ..., "template": ...}
        named = (each for each in template if isinstance(each, dict) and each.get("name") == name)
        template = next(named, {}).get("template")
    if not isinstance(template, str | None):
        what = f"chat_template is of type {type(template).__name__}"
        raise UserError(f"{directory / CONFIG}: {what}; give a string")
    return template


def special_tokens(directory: Path) -> dict[str, str]:
    """bos_token, eos_token and so on as text: chat templates write them by these names."""
    fields = sorted((fields_of(directory / SPECIAL_TOKENS) | fields_of(directory / CONFIG)).items())
    tokens = {key: _text(value) for key, value in fields if key.endswith("_token")}
    return {key: text for key, text in tokens.items() if isinstance(text, str)}


def _special(token: Any) -> AddedToken | None:
    """A token that a file names; None for anything else."""
    if isinstance(token, dict) and isinstance(token.get("content"), str):
        options = {key: value for key, value in token.items() if key != "__type"}
        token = AddedToken(**options | {"special": True})
    elif isinstance(token, str):
        token = AddedToken(token, special=True)
    return token if isinstance(token, AddedToken) and token.content else None


def _text(token: Any) -> Any:
    """A token may be written with its options: {"content": "</s>", "lstrip": false}."""
    return token.get("content") if isinstance(token, dict) else token


def fields_of(file: Path) -> dict[str, Any]:
    """Those of a config file; none if there is no such file."""
    return read_object(file) if file.is_file() else {}
