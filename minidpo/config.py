"""Configuration: the defaults below, then the TOML file, then `--section.key=value`. Unknown keys are fatal."""

import dataclasses
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from minidpo.chat import TEMPLATES
from minidpo.errors import UserError


def key(default: Any, about: str, check: Callable[[Any], bool] | None = None, must: str = "") -> Any:
    """A config field: its default, a line for --help, and what a value must satisfy, in code and in words."""
    metadata = {"about": about, "check": check, "must": must}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def positive(value: float) -> bool:
    return 0 < value < float("inf")


def not_negative(value: float) -> bool:
    return 0 <= value < float("inf")


def fraction(value: float) -> bool:
    return 0 <= value < 1


def smoothing(value: float) -> bool:
    return 0 <= value < 0.5


def one_of(*names: str) -> dict[str, Any]:
    return {"check": names.__contains__, "must": "one of " + ", ".join(names)}


@dataclass
class ModelSection:
    path: str = key("", "Hugging Face directory to start from", bool, "the path of a model directory")


@dataclass
class ReferenceSection:
    path: str = key("", "frozen reference; empty means model.path")
    precompute: bool = key(True, "reference log-probs once before training; false: alongside every step")


@dataclass
class DataSection:
    train: list[str] = key([], "preference files to learn from", bool, "a list of at least one file")
    eval: list[str] = key([], "held-out preference files; empty: hold eval_pairs out of train")
    eval_pairs: int = key(
        256, "with no eval file, about this many pairs held out by prompt", not_negative, ">= 0"
    )
    max_length: int = key(512, "most tokens of prompt + one ending", lambda n: n >= 2, ">= 2")
    max_prompt_length: int = key(384, "longer prompts lose their beginning", positive, "> 0")
    template: str = key(
        "model", "how messages become text: the model's own, hh or chatml", **one_of(*TEMPLATES)
    )
    skip_bad: bool = key(False, "leave out and count records that cannot be read, instead of stopping")
    cache: str = key("", "directory where token ids are kept between starts; empty: run.out/tokens")


@dataclass
class PreferenceLossSection:
    name: str = key("dpo", "dpo, ipo, simpo or sft", **one_of("dpo", "ipo", "simpo", "sft"))
    beta: float = key(0.1, "pull to the reference (dpo, ipo) or reward scale (simpo)", positive, "> 0")
    gamma: float = key(1.0, "simpo's target margin, outside beta", not_negative, ">= 0")
    label_smoothing: float = key(
        0.0, "assumed share of swapped labels (dpo, simpo)", smoothing, "in [0, 0.5)"
    )
    length_normalize: bool = key(False, "log-ratios per token instead of summed (dpo, ipo)")


# A value other than the default for a key that the chosen loss does not read is an error, not a silence.
LOSS_READS = {
    "dpo": {"beta", "label_smoothing", "length_normalize"},
    "ipo": {"beta", "length_normalize"},
    "simpo": {"beta", "gamma", "label_smoothing"},
    "sft": set(),
}
NEEDS_REFERENCE = ("dpo", "ipo")


@dataclass
class RewardLossSection:
    lm_weight: float = key(
        1.0, "weight of the language-modelling loss on the chosen ending", not_negative, ">= 0"
    )
    margin: float = key(0.0, "reward difference demanded of every pair", not_negative, ">= 0")
    margin_from_data: bool = key(
        False, "and on top of it each record's margin (or score_chosen - score_rejected)"
    )
    center_weight: float = key(0.0, "weight of (r_chosen + r_rejected)^2", not_negative, ">= 0")
    label_smoothing: float = key(0.0, "assumed share of swapped labels", smoothing, "in [0, 0.5)")


@dataclass
class OptimSection:
    lr: float = key(1e-6, "peak learning rate of AdamW", positive, "> 0")
    schedule: str = key("linear", "after warm-up", **one_of("cosine", "linear", "constant"))
    warmup_steps: int = key(0, "steps of linear warm-up", not_negative, ">= 0")
    weight_decay: float = key(0.0, "on matrices; never on norms and biases", not_negative, ">= 0")
    beta1: float = key(0.9, "decay of the first moment", fraction, "in [0, 1)")
    beta2: float = key(0.999, "decay of the second moment", fraction, "in [0, 1)")
    eps: float = key(1e-8, "added to the root of the second moment", positive, "> 0")
    grad_clip: float = key(1.0, "largest gradient norm; 0: no clipping", not_negative, ">= 0")
    batch_size: int = key(32, "pairs one optimizer step averages over", positive, "> 0")
    micro_tokens: int = key(8192, "tokens one forward and backward pass holds", positive, "> 0")
    epochs: float = key(1.0, "passes over the training pairs", positive, "> 0")
    max_steps: int = key(0, "stop after so many steps; 0: as epochs say", not_negative, ">= 0")


@dataclass
class RunSection:
    out: str = key("", "directory of this run", bool, "the path of a directory for the results")
    seed: int = key(
        0,
        "of the data order, the held-out split and a new reward head",
        lambda n: 0 <= n < 2**63,
        "from 0 to 2^63 - 1",
    )
    device: str = key("auto", "auto: cuda if there is one, else cpu", **one_of("auto", "cpu", "cuda"))
    dtype: str = key("bf16", "bf16: autocast over float32 weights", **one_of("bf16", "fp32"))
    threads: int = key(0, "CPU threads; 0: PyTorch's choice", not_negative, ">= 0")
    log_every: int = key(10, "steps between two lines of the log", positive, "> 0")
    eval_every: int = key(
        0, "steps between evaluations; 0: before the first and after the last", not_negative, ">= 0"
    )
    save_every: int = key(0, "steps between checkpoints; 0: only at the end", not_negative, ">= 0")
    keep_checkpoints: int = key(1, "newest checkpoints kept", positive, "> 0")
    compile: bool = key(False, "torch.compile the layers")
    activation_checkpointing: bool = key(
        False, "recompute layers in backward: less memory, a third more time"
    )


@dataclass
class PreferenceConfig:
    model: ModelSection = field(default_factory=ModelSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    data: DataSection = field(default_factory=DataSection)
    loss: PreferenceLossSection = field(default_factory=PreferenceLossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)


@dataclass
class RewardConfig:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: RewardLossSection = field(default_factory=RewardLossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)


Config = TypeVar("Config", PreferenceConfig, RewardConfig)


def load_config(kind: type[Config], arguments: list[str]) -> Config:
    """The configuration that `FILE.toml --section.key=value ...` means. Raises UserError naming file and key."""
    if any(argument in ("-h", "--help") for argument in arguments):
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


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(config)


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML that `load_config` reads back to the same values."""
    lines = []
    for section, values in to_dict(config).items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines += [f"{name} = {_toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def describe(kind: type[Config]) -> str:
    """Every key with its default and a line about it."""
    lines = ["usage: python SCRIPT CONFIG.toml [--section.key=value ...]", ""]
    for section, values in vars(kind()).items():
        lines.append(f"[{section}]")
        for f in dataclasses.fields(values):
            default = _toml_value(getattr(values, f.name))
            lines.append(f"  {f.name + ' = ' + default:<30} {f.metadata['about']}")
    return "\n".join(lines)


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
        raise UserError(f"{where}: no section [{section}]; there are {', '.join(sections)}")
    for f in dataclasses.fields(sections[section]):
        if f.name == name:
            return sections[section], f
    raise UserError(f"{where}: no key {section}.{name}; [{section}] has {', '.join(vars(sections[section]))}")


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
        for f in dataclasses.fields(values):
            value = getattr(values, f.name)
            if f.metadata["check"] and not f.metadata["check"](value):
                raise UserError(f"{section}.{f.name} = {_toml_value(value)}; it must be {f.metadata['must']}")
    if config.data.max_prompt_length >= config.data.max_length:
        raise UserError(
            f"data.max_prompt_length = {config.data.max_prompt_length} leaves no room for an ending;"
            f" it must be below data.max_length = {config.data.max_length}"
        )
    if isinstance(config.loss, PreferenceLossSection):
        for f in dataclasses.fields(config.loss):
            used = f.name == "name" or f.name in LOSS_READS[config.loss.name]
            if not used and getattr(config.loss, f.name) != f.default:
                raise UserError(
                    f"loss.{f.name} = {_toml_value(getattr(config.loss, f.name))} has no meaning for"
                    f" loss.name = {config.loss.name!r}; leave it out"
                )


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return repr(value)
