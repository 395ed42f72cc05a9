"""A setting: a dataclass field with a default, a line of help, and a check of its value. Losses and the
sections of a configuration declare their keys with `setting`; all else about a key is read from its field."""

import json
from collections.abc import Callable
from copy import copy
from dataclasses import Field, field, fields
from typing import Any, NamedTuple


class Check(NamedTuple):
    """Which values are allowed, in code and in words."""

    test: Callable[[Any], bool]
    must: str  # completes the sentence "it must be ..."


positive = Check(lambda value: 0 < value < float("inf"), "> 0")
not_negative = Check(lambda value: 0 <= value < float("inf"), ">= 0")
fraction = Check(lambda value: 0 <= value < 1, "in [0, 1)")
smoothing = Check(lambda value: 0 <= value < 0.5, "in [0, 0.5)")


def at_least(least: int) -> Check:
    return Check(lambda value: value >= least, f">= {least}")


def one_of(*names: str) -> Check:
    return Check(names.__contains__, "one of " + ", ".join(names))


def setting(default: Any, about: str, check: Check | None = None) -> Any:
    """A dataclass field; `about` is its line of --help."""
    metadata = {"about": about, "check": check}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def fault(key: Field, value: Any) -> str:
    """What is wrong with the value of a setting, such as "it must be > 0"; "" if nothing is."""
    check = key.metadata.get("check")
    return f"it must be {check.must}" if check and not check.test(value) else ""


def check_fields(owner: str, settings: Any) -> None:
    """Raises ValueError for the first field of `settings`, a dataclass object, whose value is not allowed."""
    for key in fields(settings):
        value = getattr(settings, key.name)
        if wrong := fault(key, value):
            raise ValueError(f"{owner}: {key.name} is {value!r}; {wrong}")


def keys_of(settings: Any) -> dict[str, Field]:
    """Name -> field, of a dataclass or an object of one; empty for None. Keyword-only fields come last."""
    keys = sorted(fields(settings), key=lambda key: bool(key.kw_only)) if settings is not None else ()
    return {key.name: key for key in keys}


def help_lines(settings: Any, indent: str = "  ") -> list[str]:
    """The lines of --help for a dataclass: each setting with its default, help and choices."""
    lines = []
    for name, key in keys_of(settings).items():
        check = key.metadata["check"]
        choices = f" ({check.must})" if check and check.must.startswith("one of") else ""
        assignment = f"{name} = {toml(getattr(settings(), name))}"
        lines.append(f"{indent}{assignment:<{32 - len(indent)}} {key.metadata['about']}{choices}")
    return lines


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(of_key)}" for key, of_key in value.items()) + "}"
    # Python's inf is TOML's, but not JSON's.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
