"""The sections and keys of a configuration: type, default, a line for --help, and what a value must satisfy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidpo.chat import TEMPLATES


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


def tensorboard_is_there(wanted: bool) -> bool:
    """Asked before a run does anything: minutes of data and reference later is too late to hear of it."""
    try:
        if wanted:
            import torch.utils.tensorboard  # noqa: F401  (refuses a tensorboard that is none, or too old)
    except ImportError:
        return False
    return True


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
        "model",
        "how messages become text: the model's own, hh or chatml (final/ then has it for its own)",
        **one_of(*TEMPLATES),
    )
    skip_bad: bool = key(False, "leave out and count records that cannot be read, instead of stopping")
    cache: str = key("", "directory where token ids are kept between starts; empty: run.out/tokens")


@dataclass
class EvalSection:
    samples: int = key(
        0, "held-out prompts answered at every evaluation: KL, length, rewards; 0: none", not_negative, ">= 0"
    )
    max_new_tokens: int = key(128, "tokens after which a sampled response is cut off", positive, "> 0")
    reward_model: str = key("", "a reward model's directory: mean reward, win rate against the reference")


# The losses, and which keys each reads: another value than the default for one that it does not read is an error.
LOSS_READS: dict[str, set[str]] = {
    "dpo": {"beta", "label_smoothing", "length_normalize"},
    "ipo": {"beta", "length_normalize"},
    "simpo": {"beta", "gamma", "label_smoothing"},
    "sft": set(),
}
NEEDS_REFERENCE = ("dpo", "ipo")


@dataclass
class PreferenceLossSection:
    name: str = key("dpo", ", ".join(LOSS_READS), **one_of(*LOSS_READS))
    beta: float = key(0.1, "pull to the reference (dpo, ipo) or reward scale (simpo)", positive, "> 0")
    gamma: float = key(1.0, "simpo's target margin, outside beta", not_negative, ">= 0")
    label_smoothing: float = key(
        0.0, "assumed share of swapped labels (dpo, simpo)", smoothing, "in [0, 0.5)"
    )
    length_normalize: bool = key(False, "log-ratios per token instead of summed (dpo, ipo)")


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
    tensorboard: bool = key(
        False,
        "write metrics to OUT/tensorboard too",
        tensorboard_is_there,
        "false where the package tensorboard is missing: pip install tensorboard",
    )
    compile: bool = key(False, "torch.compile the layers")
    activation_checkpointing: bool = key(
        False, "recompute layers in backward: less memory, a third more time"
    )


@dataclass
class PreferenceConfig:
    model: ModelSection = field(default_factory=ModelSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    data: DataSection = field(default_factory=DataSection)
    eval: EvalSection = field(default_factory=EvalSection)
    loss: PreferenceLossSection = field(default_factory=PreferenceLossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)

    @property
    def reference_path(self) -> Path:
        """The frozen reference's directory: by default where the policy starts."""
        return Path(self.reference.path or self.model.path)


@dataclass
class RewardConfig:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: RewardLossSection = field(default_factory=RewardLossSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)
