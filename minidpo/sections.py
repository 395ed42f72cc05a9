"""The sections and keys of a configuration: type, default, a line for --help, and the values allowed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from minidpo.errors import UserError
from minidpo.losses import DPO, BradleyTerry, PreferenceLoss
from minidpo.settings import Check, at_least, fraction, not_negative, one_of, positive, setting, toml

TEMPLATES = ("model", "hh", "chatml")
TEXTS = ("", "template", "raw")  # what text becomes where the model has a chat template; empty: ask
COLUMNS = ("prompt", "system", "chosen", "rejected", "messages", "completion", "label", "margin", "tools")
COMMAND_LINE = "command line"


def _is_date(text: str) -> bool:
    try:
        return not text or date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


_path = Check(bool, "the path of a directory")
_files = Check(bool, "a list of at least one file")
_names = Check(bool, "a list of at least one name")
_LINEAR_LAYERS = [f"{name}_proj" for name in "q k v o gate up down".split()]
_date = Check(_is_date, "a date as 2026-11-26, or empty")
_true_false_or_auto = Check((True, False, "auto").__contains__, 'true, false or "auto"')
_text = Check(TEXTS.__contains__, "template, raw or empty")
_columns = Check(set(COLUMNS).issuperset, "a table with keys of " + ", ".join(COLUMNS))
_dtype_or_auto = one_of("auto", "bf16", "fp32")
_seed = Check(lambda number: 0 <= number < 2**63, "from 0 to 2^63 - 1")


@dataclass
class ModelSection:
    path: str = setting("", "Hugging Face model directory to start from", _path)


@dataclass
class ReferenceSection:
    path: str = setting("", "directory of the frozen reference; empty: model.path")


@dataclass
class DataSection:
    train: list[str] = setting([], "preference files, or directories of them, to learn from", _files)
    eval: list[str] = setting([], "held-out preference files; empty: hold eval_pairs out of train")
    eval_pairs: int = setting(256, "with no eval file, so many pairs are held out by prompt", not_negative)
    max_length: int = setting(512, "most tokens of prompt + one response", at_least(2))
    max_prompt_length: int = setting(384, "longer prompts lose their beginning", positive)
    template: str = setting("model", "the chat template; final/ gets it, too", one_of(*TEMPLATES))
    date: str = setting("", "the day, for a chat template that asks; empty: of the start", _date)
    text: str = setting("", "template: text becomes a user's turn; raw; empty: raw, or ask", _text)
    columns: dict[str, str] = setting({}, "names of records' keys: --data.columns.prompt=KEY", _columns)
    pairs_per_prompt: str = setting("best-worst", "of several answers", one_of("best-worst", "all"))
    min_margin: float = setting(0.0, "drop pairs with a smaller margin, or with none; 0: keep all")
    limit: int = setting(0, "read only the first so many records of train, and of eval; 0: all", not_negative)
    skip_bad: bool = setting(False, "leave out and count records that cannot be read, instead of stopping")
    cache: str = setting("", "directory where token ids are kept between starts; empty: run.out/tokens")


@dataclass
class EvalSection:
    samples: int = setting(0, "held-out prompts to respond to at an evaluation; 0: none", not_negative)
    max_new_tokens: int = setting(128, "tokens after which a sampled response is cut off", positive)
    reward_model: str = setting("", "a reward model's directory: mean reward, wins over the reference")


@dataclass
class LoRASection:
    rank: int = setting(0, "rank r of the adapters; 0: none, all weights are trained", not_negative)
    alpha: float = setting(32.0, "the product of both adapters is scaled by alpha / rank", positive)
    rank_scaled: bool = setting(False, "it is scaled by alpha / sqrt(rank) instead (rsLoRA)")
    targets: list[str] = setting(_LINEAR_LAYERS, "the linear layers that get adapters", _names)
    base_dtype: str = setting("auto", "of frozen weights; auto: run.dtype on cuda", _dtype_or_auto)
    final_dtype: str = setting("fp32", "of merged weights; bf16 rounds updates away", one_of("fp32", "bf16"))


@dataclass
class OptimSection:
    lr: float = setting(1e-6, "peak learning rate of AdamW", positive)
    schedule: str = setting("linear", "after warm-up", one_of("cosine", "linear", "constant"))
    warmup_steps: int = setting(0, "steps of linear warm-up", not_negative)
    warmup_ratio: float = setting(0.0, "or the share of all steps that warm-up takes, rounded up", fraction)
    weight_decay: float = setting(0.0, "on matrices; never on norms and biases", not_negative)
    beta1: float = setting(0.9, "decay of the first moment", fraction)
    beta2: float = setting(0.999, "decay of the second moment", fraction)
    eps: float = setting(1e-8, "added to the root of the second moment", positive)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", not_negative)
    batch_size: int = setting(32, "pairs that one optimizer step averages over", positive)
    micro_tokens: int = setting(8192, "tokens that one forward and backward pass holds", positive)
    epochs: float = setting(1.0, "passes over the training pairs", positive)
    max_steps: int = setting(0, "stop after so many steps; 0: as many as the epochs fill", not_negative)


@dataclass
class RunSection:
    out: str = setting("", "directory for the results of this run", _path)
    seed: int = setting(0, "of the data order, the held-out split and a new reward head", _seed)
    device: str = setting("auto", "auto: cuda, else cpu", one_of("auto", "cpu", "cuda", "mps"))
    dtype: str = setting("bf16", "bf16: autocast over float32 weights", one_of("bf16", "fp32"))
    threads: int = setting(0, "CPU threads; 0: PyTorch's choice", not_negative)
    log_every: int = setting(10, "steps between two lines of the log", positive)
    eval_every: int = setting(0, "steps between evaluations; 0: first and last step only", not_negative)
    save_every: int = setting(0, "steps between checkpoints; 0: only at the end", not_negative)
    keep_checkpoints: int = setting(1, "newest checkpoints kept", positive)
    compile: bool | str = setting("auto", "torch.compile the layers; auto: on cuda only", _true_false_or_auto)
    attention: str = setting(
        "auto", "on cuda; auto: flash in bf16, else flex", one_of("auto", "flex", "sdpa")
    )
    activation_checkpointing: bool = setting(False, "less memory, a third more time per step")


class Sources:
    """Where each key of a configuration was set."""

    # "section.key" -> COMMAND_LINE, or the name of the file. Without a type it is no field of a dataclass.
    sources = dict[str, str]()

    def named(self, key: str) -> str:
        """A key as its user knows it: "data.eval in configs/hh_dpo.toml", or "--data.eval"."""
        return named_key(key, self.sources.get(key, ""))

    def naming(self, key: str, check: Callable[..., object], *arguments: Any) -> None:
        """check(*arguments), of the path that is the value of `key`; a UserError says where that was set."""
        try:
            check(*arguments)
        except UserError as error:
            raise UserError(f"{error}; see {self.named(key)}") from None

    def as_set(self, section: str, name: str) -> str:
        """Such as "optim.lr in configs/hh_dpo.toml = 1e-06"."""
        return f"{self.named(f'{section}.{name}')} = {toml(getattr(getattr(self, section), name))}"


def named_key(key: str, where: str) -> str:
    if where == COMMAND_LINE:
        return f"--{key}"
    return f"{key} in {where}" if where else key


@dataclass
class DPOConfig(Sources):
    """What train_dpo.py reads."""

    model: ModelSection = field(default_factory=ModelSection)
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    data: DataSection = field(default_factory=DataSection)
    eval: EvalSection = field(default_factory=EvalSection)
    loss: PreferenceLoss = field(default_factory=DPO)  # any of LOSSES, by loss.name
    lora: LoRASection = field(default_factory=LoRASection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)

    @property
    def reference_path(self) -> Path:
        """The frozen reference's directory: by default where the policy starts."""
        return Path(self.reference.path or self.model.path)

    @property
    def base_is_reference(self) -> bool:
        """Whether the reference is the policy with its adapters off, and needs no memory of its own."""
        return self.lora.rank > 0 and self.reference_path.resolve() == Path(self.model.path).resolve()


@dataclass
class RewardConfig(Sources):
    """What train_rm.py reads."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    loss: BradleyTerry = field(default_factory=BradleyTerry)
    lora: LoRASection = field(default_factory=LoRASection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)
