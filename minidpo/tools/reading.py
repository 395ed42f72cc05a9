"""The options with which a command reads records as a run would, those of [data] that say what is a pair."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minidpo.config import text_of_model
from minidpo.errors import UserError
from minidpo.sections import COLUMNS, TEXTS, DataSection


def add_reading_options(add: Callable[..., Any]) -> None:
    """add: an argparse parser's add_argument."""
    add("--text", choices=TEXTS[1:], help="as data.text (default: that of the run which made the model)")
    about = f"as data.columns.NAME; repeat it for several. NAME: {', '.join(COLUMNS)}"
    add("--column", metavar="NAME=KEY", action="append", default=[], help=about)


def reading_section(options: argparse.Namespace, model: str | Path, **settings: Any) -> DataSection:
    """What the options say, and `settings` of [data] besides. model: whose run to ask for data.text."""
    columns = {}
    for option in options.column:
        name, equals, key = option.partition("=")
        if not equals or name not in COLUMNS:
            raise UserError(f"--column {option}: give NAME=KEY, NAME one of {', '.join(COLUMNS)}")
        columns[name] = key
    return DataSection(text=options.text or text_of_model(Path(model)), columns=columns, **settings)
