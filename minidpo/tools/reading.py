"""What commands take over from the run that made a model, and their options that change it."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import Field, replace
from pathlib import Path
from typing import Any

from minidpo.config import config_of_run, loss_of_run, text_of_model
from minidpo.errors import UserError
from minidpo.losses import DPO, LOSSES, PreferenceLoss
from minidpo.sections import COLUMNS, TEXTS, DataSection
from minidpo.settings import keys_of

Add = Callable[..., Any]  # an argparse parser's add_argument


def option_of(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def add_settings(add: Add, settings: Mapping[str, Field], default: str) -> None:
    """An option per setting, None where it is not given; the help says what is its default then."""
    for name, key in settings.items():
        kind: Any = {"action": "store_true"} if key.default is False else {"type": type(key.default)}
        add(option_of(name), default=None, help=f"{key.metadata['about']} ({default})", **kind)


def add_reading_options(add: Add) -> None:
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


def chosen_loss(
    model: Path, usable: Callable[[PreferenceLoss], bool], name: str | None, given: Mapping[str, Any]
) -> tuple[PreferenceLoss, str | None]:
    """The loss of that name, or that of the run which made the model if it is usable, or DPO; and the file
    that its settings are from, None for the defaults. given: settings that take the place of those."""
    of_run = loss_of_run(model)
    of_run = of_run if of_run and usable(of_run) else None
    name = name or (of_run.name if of_run else DPO.name)
    begin: Any = of_run if of_run and of_run.name == name else LOSSES[name]()
    if foreign := given.keys() - keys_of(begin).keys():
        has = ", ".join(map(option_of, keys_of(begin))) or "no settings"
        raise UserError(f"{option_of(foreign.pop())}: the loss {name} has no such setting; it has {has}")
    try:
        loss = replace(begin, **given)
    except ValueError as error:
        raise UserError(str(error)) from None
    return loss, str(config_of_run(model)) if begin is of_run else None
