"""Configuration: the defaults, then the TOML file, then `--section.key=value`. Unknown keys are errors.

The keys are those of sections.py; those of train_dpo.py's [loss] are `name` and the fields of that loss.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from minidpo.arguments import Values, file_of, read_toml, read_value, typed
from minidpo.distributed import rank
from minidpo.errors import UserError
from minidpo.losses import DPO, LOSSES, BradleyTerry, PreferenceLoss
from minidpo.sections import COMMAND_LINE, DataSection, DPOConfig, RewardConfig, named_key
from minidpo.settings import fault, help_lines, keys_of, one_of, setting, toml

Config = TypeVar("Config", DPOConfig, RewardConfig)


@dataclasses.dataclass
class LossName:
    name: str = setting(DPO.name, "which loss", one_of(*LOSSES))


NAME = keys_of(LossName)["name"]
IN_WORDS: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    bool | str: 'true, false or "auto"',
    int: "a whole number",
    float: "a number",
    list[str]: "a list of texts",
    dict[str, str]: "a table of texts",
}


def load_config(kind: type[Config], arguments: list[str]) -> Config:
    """The configuration that `FILE.toml --section.key=value ...` means. A UserError names file and key."""
    if any(argument in ("-h", "--help") for argument in arguments):
        if rank() == 0:
            print(describe(kind))
        raise SystemExit(0)
    file, of_file = file_of(arguments)
    from_command_line = typed([argument for argument in arguments if argument.startswith("--")])
    sections = _section_types(kind, file, of_file, from_command_line)
    values: Values = {section: {} for section in sections}
    sources: dict[str, str] = {}
    for where, given in ((file, of_file), (COMMAND_LINE, from_command_line)):
        for section, settings in given.items():
            for name, value in settings.items():
                key = _key(sections, section, name, where)
                value = _value(section, key, value, where)
                # The command line changes single entries of a table.
                former = values[section].get(name)
                values[section][name] = former | value if isinstance(former, dict) else value
                sources[f"{section}.{name}"] = where
    config = kind(**{section: sections[section](**values[section]) for section in sections})
    config.sources = sources
    _check(config)
    return config


def load_either_config(arguments: list[str]) -> DPOConfig | RewardConfig:
    """As `load_config`, of either script: train_rm.py's if [loss] has a key that only it knows."""
    _, of_file = file_of(arguments)
    of_losses = {name for loss in LOSSES.values() for name in keys_of(loss)}
    of_reward_model = (keys_of(BradleyTerry).keys() - of_losses) & of_file.get("loss", {}).keys()
    return load_config(RewardConfig, arguments) if of_reward_model else load_config(DPOConfig, arguments)


def config_of_run(model: Path) -> Path | None:
    """The config.toml of the run whose final/, final/adapter/ or checkpoint `model` is; else None."""
    model = model.resolve()  # It may be a link, or ".".
    below = model.parent.name == "checkpoints" or model.parts[-2:] == ("final", "adapter")
    file = model.parents[1 if below else 0] / "config.toml"
    return file if (below or model.name == "final") and file.is_file() else None


def loss_of_run(model: Path) -> PreferenceLoss | None:
    """The loss of the run that wrote `model`; None if no run of train_dpo.py did."""
    file = config_of_run(model)
    given = read_toml(file).get("loss", {}) if file else {}
    cls = LOSSES.get(given.pop("name", ""))
    if cls is None:
        return None
    keys = {name: _key({"loss": cls}, "loss", name, str(file)) for name in given}
    return cls(**{name: _value("loss", keys[name], value, str(file)) for name, value in given.items()})


def settings_of_run(out: Path, section: str) -> dict[str, Any]:
    """A section of the configuration that the run in the directory `out` has written down."""
    try:
        return read_toml(out / "config.toml").get(section, {})
    except UserError:  # There is no such file, or a spoilt one that is about to be written again.
        return {}


def data_of_model(model: Path) -> DataSection:
    """[data] of the run whose final/ or checkpoint `model` is. Without a run `train` is empty."""
    file = config_of_run(model)
    given = read_toml(file).get("data", {}) if file else {}
    return DataSection(**{name: given[name] for name in keys_of(DataSection) if name in given})


def to_dict(config: DPOConfig | RewardConfig) -> Values:
    """Section -> key -> value. The [loss] of train_dpo.py begins with its name."""
    sections = dataclasses.asdict(config)
    if isinstance(config, DPOConfig):
        sections["loss"] = {"name": config.loss.name} | sections["loss"]
    return sections


def to_toml(config: DPOConfig | RewardConfig) -> str:
    """The resolved configuration as TOML that `load_config` reads back to the same values."""
    blocks = []
    for section, values in to_dict(config).items():
        lines = (f"{name} = {toml(value)}" for name, value in values.items())
        blocks.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def describe(kind: type[DPOConfig] | type[RewardConfig]) -> str:
    """Every key with its default and a line about it."""
    lines = ["usage: python SCRIPT CONFIG.toml [--section.key=value ...]", ""]
    for section, section_type in get_type_hints(kind).items():
        lines.append(f"[{section}]")
        if section_type is not PreferenceLoss:
            lines += help_lines(section_type)
            continue
        lines += help_lines(LossName)
        for name, loss in LOSSES.items():
            lines += [f"  with name = {toml(name)}, {loss.equation}:", *help_lines(loss, indent="    ")]
    return "\n".join(lines)


def _section_types(kind: type, file: str, of_file: Values, typed: Values) -> dict[str, Any]:
    """Section -> its dataclass. loss.name, which is taken out here, chooses that of train_dpo.py's [loss]."""
    types = get_type_hints(kind)
    if kind is RewardConfig:
        return types

    names = [DPO.name]
    for given, where in ((of_file, file), (typed, COMMAND_LINE)):
        name = given.get("loss", {}).pop("name", None)
        names.append(names[-1] if name is None else _value("loss", NAME, name, where))
    _, former, chosen = names
    # Where the command line chooses another loss, the keys in the file's [loss] belong to the former one.
    if chosen != former and (dropped := of_file.pop("loss", {})) and rank() == 0:
        same = (dropped.keys() & keys_of(LOSSES[chosen])) - typed.get("loss", {}).keys()
        own = ", ".join(f"{name} = {toml(getattr(LOSSES[chosen], name))}" for name in sorted(same))
        what, default = ", ".join(dropped), f"; {chosen} takes {own} by default" if own else ""
        print(f"loss.name = {chosen}: {what} in {file} belong to {former} and are not read{default}")
    return types | {"loss": LOSSES[chosen]}


def _key(sections: dict[str, Any], section: str, name: str, where: str) -> dataclasses.Field:
    """The field that section.name is. Raises UserError that lists those there are."""
    keys = keys_of(sections.get(section))
    if name in keys:
        return keys[name]
    theirs, script = {**get_type_hints(DPOConfig), "loss": DPO}, "train_dpo.py"
    if "reference" in sections:
        theirs, script = get_type_hints(RewardConfig), "train_rm.py, bench --loss rm"
    hint = f" (it belongs to {script})" if name in keys_of(theirs.get(section)) else ""
    if section not in sections:
        raise UserError(f"{where}: no section [{section}]; there are {', '.join(sections)}{hint}")
    of_loss = f" of {sections[section].name}" if section == "loss" else ""
    names = ", ".join(["name"] * issubclass(sections[section], PreferenceLoss) + [*keys])
    raise UserError(f"{where}: no key {section}.{name}; [{section}]{of_loss} has {names}{hint}")


def _value(section: str, key: dataclasses.Field, value: Any, where: str) -> Any:
    """`value` for the setting `key`, of its type and allowed."""
    if where == COMMAND_LINE and isinstance(value, str):
        value = read_value(key, value)
    if key.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    types = (bool, str) if key.type == bool | str else (get_origin(key.type) or key.type,)
    items = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    named = named_key(f"{section}.{key.name}", where)
    if type(value) not in types or not all(isinstance(item, str) for item in items):
        raise UserError(f"{named} = {value!r}; {IN_WORDS[key.type]} is needed")
    if wrong := fault(key, value):
        raise UserError(f"{named} = {toml(value)}; {wrong}")
    return value


def _check(config: DPOConfig | RewardConfig) -> None:
    """What defaults and settings must fulfil together."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for name, key in keys_of(values).items():
            if wrong := fault(key, getattr(values, name)):
                raise UserError(f"{config.as_set(section.name, name)}; {wrong}")
    if (Path(config.run.out) / "config.json").is_file():
        out = config.as_set("run", "out")
        raise UserError(f"{out} holds a model (config.json); a run needs a directory of its own")
    if config.optim.warmup_steps and config.optim.warmup_ratio:
        steps, ratio = config.as_set("optim", "warmup_steps"), config.as_set("optim", "warmup_ratio")
        raise UserError(f"{steps} and {ratio}; give one of them, and 0 for the other")
    if config.data.max_prompt_length >= config.data.max_length:
        prompt, text = config.as_set("data", "max_prompt_length"), config.as_set("data", "max_length")
        raise UserError(f"{prompt} leaves no room for a response; it must be below {text}")
