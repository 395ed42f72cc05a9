"""The tokenizer's files in the directory of a saved model: those of the model that the run began with. They
name special tokens alike, whichever program opens them.

EOS   the tokenizer's, with which every response was trained, is the first at which generation ends
pad   of a reward model: transformers reads the score at the last token that is not pad, so EOS cannot be it
"""

import json
import re
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from minidpo.data import Tokenizer
from minidpo.data.tokenizer_files import (
    ADDED_TOKENS,
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION,
    MORE_TEMPLATES,
    SPECIAL_TOKENS,
    find_template,
    special_tokens,
)
from minidpo.errors import UserError
from minidpo.files import read_object

NEW_PAD = "<|pad|>"


def tokenizer_files(directory: Path) -> dict[str, bytes]:
    """The tokenizer and generation files of a model directory, by name. A link is followed, because model
    caches are made of links. So content that is not what the name says is a UserError: it would be copied to
    a place from which models are published."""
    more = (f"{MORE_TEMPLATES}/{file.name}" for file in (directory / MORE_TEMPLATES).glob("*.jinja"))
    names = ("tokenizer.json", CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, CHAT_TEMPLATE, GENERATION, *more)
    files = {name: directory / name for name in names if (directory / name).is_file()}
    for name, file in files.items():
        template = "default" if name == CHAT_TEMPLATE else file.stem
        if file.suffix == ".json":
            read_object(file)
        elif not re.search("{[{%]", find_template(directory, template) or ""):
            raise UserError(f"{file}: not a jinja template, it has no {{{{ and no {{%; fetch it again")
    # transformers reads no JSON that has a byte order mark.
    return {name: file.read_bytes().removeprefix(BOM_UTF8) for name, file in files.items()}


def write_tokenizer(directory: Path, files: dict[str, bytes], template: str | None, rewards: bool) -> None:
    """Write `files` to the directory of a model, whose special tokens are aligned, or of adapters.
    template: a chat template in place of those among `files`; rewards: whether it is a reward model."""
    for name, content in files.items():
        if template is None or Path(name).parent.name != MORE_TEMPLATES:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)
    if template is not None:
        (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        edit_field(directory / CONFIG, "chat_template", None)  # Some programs look there first.
    if "tokenizer.json" not in files or not (directory / "config.json").is_file():
        return
    tokenizer = Tokenizer.from_pretrained(directory)
    for name in ("config.json", GENERATION):
        if (directory / name).is_file():
            known = read_object(directory / name).get("eos_token_id")
            ids = [tokenizer.eos_id, *(known if isinstance(known, list) else [known])]
            ids = [i for i in dict.fromkeys(ids) if i is not None]
            edit_field(directory / name, "eos_token_id", ids if len(ids) > 1 else ids[0])
    if rewards:
        token, pad_id = _pad(directory, tokenizer) or (None, None)
        edit_field(directory / "config.json", "pad_token_id", pad_id)
        # Tokens that tokenizer.json does not list get their ids in the order in which the other files name
        # them, which a new name for pad would change. So it lists them.
        tokenizer.save(directory / "tokenizer.json", [NEW_PAD] if pad_id == tokenizer.next_id else [])
        for name in (CONFIG, SPECIAL_TOKENS):
            edit_field(directory / name, "pad_token", token)


def edit_field(file: Path, key: str, value: Any) -> None:
    """Set a field of a JSON file, if there is that file; None removes the field."""
    if file.is_file():
        fields = {name: old for name, old in read_object(file).items() if name != key}
        fields |= {} if value is None else {key: value}
        file.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pad(directory: Path, tokenizer: Tokenizer) -> tuple[str, int] | None:
    """What can be pad: the token that is named so, another special one, or a new one in an unused row."""
    config, template = read_object(directory / "config.json"), find_template(directory) or ""
    pad_id, rows = config.get("pad_token_id"), config["vocab_size"]
    named = special_tokens(directory).get("pad_token", "")
    by_id = "" if pad_id is None else tokenizer.piece(pad_id)
    others = sorted(tokenizer.special_ids, key=lambda token: "pad" not in token)  # such as <|image_pad|>
    ids = {NEW_PAD: tokenizer.next_id} | tokenizer.special_ids
    for token in (named, by_id, *others, NEW_PAD):
        # A text may end with what the template writes.
        if token not in template and ids.get(token, rows) < rows and ids[token] not in tokenizer.stop_ids:
            return token, ids[token]
    return None
