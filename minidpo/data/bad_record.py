"""What is wrong with one record, and the checks that every reader of records shares."""

import re

# A preference of a million tokens is about 4 MB. Far beyond that is a broken file, or a small compressed file
# made to fill the memory of whoever opens it.
LONGEST_RECORD = 16 * 2**20

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell what UTF-8, and a tokenizer, cannot


class BadRecord(ValueError):
    """A record that cannot be read. Those that fail alike are counted together, by their `kind`; `rest` says
    where in the record, and what would be right."""

    def __init__(self, kind: str, rest: str) -> None:
        super().__init__(kind + rest)
        self.kind = kind


def too_long() -> BadRecord:
    return BadRecord(f"more than {LONGEST_RECORD} bytes", "; no preference is that long")


def check_characters(text: str, name: str) -> None:
    if _LONE_SURROGATE.search(text):
        raise BadRecord(f"{name} has half a surrogate pair", " (\\ud800 to \\udfff); give whole characters")


def printable(text: str) -> str:
    """`text` on one line, for messages."""
    return text if text.isprintable() else ascii(text)
