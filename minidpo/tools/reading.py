"""What commands take over from the run that made a model, and their options that change it."""

import argparse
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, replace
from pathlib import Path
from typing import Any

import numpy as np

from minidpo.config import config_of_run, data_of_model, loss_of_run
from minidpo.data.paths import data_files
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
    return DataSection(text=options.text or data_of_model(Path(model)).text, columns=columns, **settings)


def trained_on(model: Path, file: Path) -> str:
    """A warning if `file` is one of data.train of the run which made the model; else empty."""
    data, files = data_of_model(model), set[Path]()
    for name in data.train:
        with suppress(UserError):  # It is no longer there, so it is not `file`.
            files |= set(map(Path.resolve, map(Path, data_files([name]))))
    if file.resolve() not in files:
        return ""
    held_out = 0 if data.eval else data.eval_pairs
    but = f", but for about {held_out} pairs that it held out" if held_out else ""
    return f"warning: the model was trained on {file} (data.train in {config_of_run(model)}){but}"


def cut_in_training(model: Path, lengths: np.ndarray) -> tuple[int, str]:
    """How many pairs the run which made the model cuts, and by which limits. lengths: (n, 1 + K), tokens of
    prompts and responses."""
    data = data_of_model(model)
    prompts = lengths[:, 0].clip(max=data.max_prompt_length)
    cut = (prompts < lengths[:, 0]) | (prompts + lengths[:, 1:].max(axis=1) > data.max_length)
    limits = f"data.max_length = {data.max_length}, data.max_prompt_length = {data.max_prompt_length}"
    return int(cut.sum()) if data.train else 0, limits


def chosen_loss(
    model: Path, usable: Callable[[PreferenceLoss], bool], name: str | None, given: Mapping[str, Any]
) -> tuple[PreferenceLoss, str | None]:
    """The loss of that name, or that of the run which made the model if it is usable, or DPO; and the file
    that its settings are from, None for the defaults. given: settings that take the place of those."""
    of_run = loss_of_run(model)
    name = name or (of_run.name if of_run and usable(of_run) else DPO.name)
    begin: Any = of_run if of_run and of_run.name == name else LOSSES[name]()
    if foreign := given.keys() - keys_of(begin).keys():
        has = ", ".join(map(option_of, keys_of(begin))) or "no settings"
        raise UserError(f"{option_of(foreign.pop())}: the loss {name} has no such setting; it has {has}")
    try:
        loss = replace(begin, **given)
    except ValueError as error:
        raise UserError(str(error)) from None
    return loss, str(config_of_run(model)) if begin is of_run else None
