"""The special tokens of a model that is saved: its files name them alike, whichever program opens it.

EOS   the tokenizer's, with which every response was trained, is the first at which generation ends
pad   of a reward model: transformers reads the score at the last token that is not pad, so EOS cannot be it
"""

import json
from pathlib import Path
from typing import Any

from minidpo.data import Tokenizer
from minidpo.data.tokenizer_files import CONFIG, GENERATION, SPECIAL_TOKENS, find_template, special_tokens
from minidpo.files import read_object

NEW_PAD = "<|pad|>"


def align_special_tokens(directory: Path, rewards: bool) -> None:
    """Write the tokenizer's EOS, and a reward model's pad token, to the files of a model directory."""
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
    usual = [
        special_tokens(directory).get("pad_token", ""),
        "" if pad_id is None else tokenizer.piece(pad_id),
    ]
    others = sorted(tokenizer.special_ids, key=lambda token: "pad" not in token)  # such as <|image_pad|>
    ids = {NEW_PAD: tokenizer.next_id} | tokenizer.special_ids
    for token in (*usual, *others, NEW_PAD):
        # A text may end with what the template writes.
        if token not in template and ids.get(token, rows) < rows and ids[token] not in tokenizer.stop_ids:
            return token, ids[token]
    return None
