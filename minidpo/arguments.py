"""What a configuration is made of, as it was written: a TOML file, and `--section.key=value` arguments."""

import tomllib
from dataclasses import Field
from pathlib import Path
from typing import Any

from minidpo.errors import UserError

Values = dict[str, dict[str, Any]]  # section -> key -> value


def file_of(arguments: list[str]) -> tuple[str, Values]:
    """The one configuration file among the arguments, and what it says."""
    files = [argument for argument in arguments if not argument.startswith("--")]
    if len(files) != 1:
        extra = f" ({', '.join(files)}; settings are written --section.key=value, with =)" if files else ""
        raise UserError(f"one configuration file is needed, {len(files)} given{extra}; --help lists the keys")
    return files[0], read_toml(Path(files[0]))


def read_toml(path: Path) -> Values:
    try:
        sections = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from None
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section!r} stands outside any [section]")
    return sections


def typed(arguments: list[str]) -> Values:
    """`--section.key=value`, as text; `--section.key.name=value` is one entry of a table."""
    sections: Values = {}
    for argument in arguments:
        name, equals, text = argument[2:].partition("=")
        section, dot, name = name.partition(".")
        if not (equals and dot):
            raise UserError(f"{argument}: command-line settings have the form --section.key=value")
        values, (name, is_entry, entry) = sections.setdefault(section, {}), name.partition(".")
        if not is_entry:
            values[name] = text
        elif isinstance(values.setdefault(name, {}), dict):
            values[name][entry] = text
        else:
            raise UserError(f"{argument}: --{section}.{name} is given as a whole, too; give one of them")
    return sections


def read_value(key: Field, text: str) -> Any:
    """Text from the command line: texts need no quotes there, lists are separated by commas."""
    if key.type is str:
        return text
    if key.type == list[str] and not text.startswith("["):
        return [part for part in text.split(",") if part]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # which has the wrong type, and the configuration says so
