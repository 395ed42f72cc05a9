"""Configuration: the defaults of sections.py, then the TOML file, then `--section.key=value`. Unknown keys are fatal."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from minidpo.distributed import rank
from minidpo.errors import UserError
from minidpo.files import writing
from minidpo.sections import LOSS_READS, PreferenceConfig, PreferenceLossSection, RewardConfig

Config = TypeVar("Config", PreferenceConfig, RewardConfig)


def load_config(kind: type[Config], arguments: list[str]) -> Config:
    """The configuration that `FILE.toml --section.key=value ...` means. Raises UserError naming file and key."""
    if any(argument in ("-h", "--help") for argument in arguments):
        if rank() == 0:
            print(describe(kind))
        raise SystemExit(0)
    files = [argument for argument in arguments if not argument.startswith("--")]
    if len(files) != 1:
        extra = f" ({', '.join(files)}; settings are written --section.key=value, with =)" if files else ""
        raise UserError(f"one configuration file is needed, {len(files)} given{extra}; --help lists the keys")
    config = kind()
    for section, values in _read_toml(Path(files[0])).items():
        if not isinstance(values, dict):
            raise UserError(f"{files[0]}: {section!r} stands outside any [section]")
        for name, value in values.items():
            _set(config, section, name, value, files[0])
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            section, dot, name = name.partition(".")
            if not (equals and dot):
                raise UserError(f"{argument}: command-line settings have the form --section.key=value")
            _set(config, section, name, _parse(config, section, name, text), "command line")
    _check(config)
    return config


def load_either_config(arguments: list[str]) -> PreferenceConfig | RewardConfig:
    """As `load_config`, of a configuration of either script: train_rm.py's where [loss] has a key that only it knows."""
    files = [argument for argument in arguments if not argument.startswith("--")]
    loss = _read_toml(Path(files[0])).get("loss") if len(files) == 1 else None
    of_reward_models = vars(RewardConfig().loss).keys() - vars(PreferenceConfig().loss).keys()
    if isinstance(loss, dict) and of_reward_models & loss.keys():
        return load_config(RewardConfig, arguments)
    return load_config(PreferenceConfig, arguments)


def loss_of_run(model: Path) -> PreferenceLossSection | None:
    """[loss] of the run whose final/ `model` is, from the config.toml beside it; None where there is none, or it is no
    preference loss."""
    file = model.parent / "config.toml"
    if model.resolve().name != "final" or not file.is_file():
        return None
    loss = _read_toml(file).get("loss")
    if not isinstance(loss, dict) or loss.get("name") not in LOSS_READS:
        return None
    config = PreferenceConfig()
    for name, value in loss.items():
        _set(config, "loss", name, value, str(file))
    check_section("loss", config.loss)
    return config.loss


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(config)


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load_config` reads back to the same values."""
    lines: list[str] = []
    for section, values in to_dict(config).items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines += [f"{name} = {_toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def write_config(config: Config, out: Path) -> None:
    """OUT/config.toml: the resolved configuration."""
    if rank() == 0:
        with writing(out / "config.toml"):
            (out / "config.toml").write_text(to_toml(config), encoding="utf-8")


def describe(kind: type[Config]) -> str:
    """Every key with its default and a line about it."""
    lines = ["usage: python SCRIPT CONFIG.toml [--section.key=value ...]", ""]
    for section, values in vars(kind()).items():
        lines.append(f"[{section}]")
        for f in dataclasses.fields(values):
            default = _toml_value(getattr(values, f.name))
            choices = f" ({f.metadata['must']})" if f.metadata["must"].startswith("one of") else ""
            lines.append(f"  {f.name + ' = ' + default:<30} {f.metadata['about']}{choices}")
    return "\n".join(lines)


def check_section(section: str, values: Any) -> None:
    """Raises UserError that names the key for a value out of range, or one that the chosen loss does not read."""
    for f in dataclasses.fields(values):
        value = getattr(values, f.name)
        if f.metadata["check"] and not f.metadata["check"](value):
            raise UserError(f"{section}.{f.name} = {_toml_value(value)}; it must be {f.metadata['must']}")
    if isinstance(values, PreferenceLossSection):
        for f in dataclasses.fields(values):
            used = f.name == "name" or f.name in LOSS_READS[values.name]
            if not used and getattr(values, f.name) != f.default:
                raise UserError(
                    f"{section}.{f.name} = {_toml_value(getattr(values, f.name))} has no meaning for"
                    f" {section}.name = {values.name!r}; leave it out"
                )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from None


def _lookup(config: Any, section: str, name: str, where: str) -> tuple[Any, dataclasses.Field]:
    sections = vars(config)
    if section not in sections:
        raise UserError(
            f"{where}: no section [{section}]; there are {', '.join(sections)}{_hint(config, section)}"
        )
    for f in dataclasses.fields(sections[section]):
        if f.name == name:
            return sections[section], f
    keys = ", ".join(vars(sections[section]))
    raise UserError(f"{where}: no key {section}.{name}; [{section}] has {keys}{_hint(config, section, name)}")


def _hint(config: Any, section: str, name: str = "") -> str:
    """Whose key it would be."""
    of_rm = type(config) is PreferenceConfig
    other, script = (
        vars(RewardConfig() if of_rm else PreferenceConfig()),
        f"train_{'rm' if of_rm else 'dpo'}.py",
    )
    there = vars(other[section]) if section in other else None
    return f" (it belongs to {script})" if there is not None and (not name or name in there) else ""


def _set(config: Any, section: str, name: str, value: Any, where: str) -> None:
    target, _ = _lookup(config, section, name, where)
    kind = get_type_hints(type(target))[name]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    fits = isinstance(value, list) and all(isinstance(v, str) for v in value) if kind == list[str] else (
        type(value) is kind
    )  # fmt: skip
    if not fits:
        wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        raise UserError(
            f"{where}: {section}.{name} = {value!r}; {wanted.get(kind, 'a list of texts')} is needed"
        )
    setattr(target, name, value)


def _parse(config: Any, section: str, name: str, text: str) -> Any:
    """A command-line value by its key's type; text needs no quotes, a list is separated by commas."""
    target, _ = _lookup(config, section, name, "command line")
    kind = get_type_hints(type(target))[name]
    if kind is str:
        return text
    if kind == list[str] and not text.startswith("["):
        return [part for part in text.split(",") if part]
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # of the wrong type: `_set` says so


def _check(config: Any) -> None:
    for section, values in vars(config).items():
        check_section(section, values)
    if (Path(config.run.out) / "config.json").is_file():
        raise UserError(
            f"run.out = {config.run.out} holds a model (config.json); a run wants a directory of its own"
        )
    if config.data.max_prompt_length >= config.data.max_length:
        raise UserError(
            f"data.max_prompt_length = {config.data.max_prompt_length} leaves no room for an ending;"
            f" it must be below data.max_length = {config.data.max_length}"
        )


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
