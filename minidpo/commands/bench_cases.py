"""What `bench` measures on: a model, pairs, and the settings of the step, all from their names."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from minidpo.config import load_config
from minidpo.dataset import require_fit, stream_pairs
from minidpo.errors import UserError
from minidpo.hf_config import read_config
from minidpo.losses import bradley_terry_loss
from minidpo.metrics import say
from minidpo.model import ModelConfig, Transformer
from minidpo.objective import preference
from minidpo.packing import PairTokens, Wanted
from minidpo.report import DataReport
from minidpo.reward import RewardModel
from minidpo.sections import (
    DataSection,
    OptimSection,
    PreferenceConfig,
    PreferenceLossSection,
    RewardConfig,
    RunSection,
)
from minidpo.shapes import named_shape
from minidpo.tokenizer import Tokenizer, TokenPair
from minidpo.weights import load_model

LOSSES = ("dpo", "ipo", "simpo", "sft", "rm")
SHAPES = ("A", "B", "C", "0.5B", "1.5B")
BOS, EOS, PAD = 1, 2, 0


@dataclass(frozen=True)
class Settings:
    """Of the step that is measured; plain values, so that a child process can be told them."""

    loss: str = "dpo"
    beta: float = 0.1
    dtype: str = "bf16"
    batch_size: int = 8
    micro_tokens: int = 8192
    device: str = "auto"
    threads: int = 0
    compile: bool = False
    activation_checkpointing: bool = False
    lr: float = 1e-6
    steps: int = 10

    @property
    def optim(self) -> OptimSection:
        return OptimSection(lr=self.lr, batch_size=self.batch_size, micro_tokens=self.micro_tokens)

    @property
    def run(self) -> RunSection:
        return RunSection(dtype=self.dtype)

    @property
    def wanted(self) -> Wanted:
        if self.loss == "rm":
            return Wanted(rewards=True)
        return Wanted(chosen_logps=True, rejected_logps=self.loss != "sft")

    def losses(self, values: torch.Tensor, reference: torch.Tensor | None, lengths: torch.Tensor):
        """values (B, 2): log-probs, or rewards for `rm` (sft (B, 1)) -> losses (B,) and what is watched."""
        if self.loss == "rm":
            chosen, rejected = values.unbind(dim=1)
            losses = bradley_terry_loss(chosen, rejected)
            return losses, {"loss": losses}
        return preference(PreferenceLossSection(self.loss, self.beta), values, reference, lengths)

    def as_dict(self) -> dict:
        return asdict(self)


def random_model(config: ModelConfig, device: torch.device) -> Transformer:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return Transformer(config)


def find_model(options, device: torch.device) -> tuple[str, Transformer, Path | None]:
    """Its name, the model, and the directory it is from: None where its weights are random."""
    if options.shape:
        config = replace(named_shape(options.shape), bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
        return f"shape {options.shape}, random weights", random_model(config, device), None
    if options.model.endswith("config.json"):
        config = read_config(Path(options.model).parent)
        return f"{options.model}, random weights", random_model(config, device), None
    return options.model, load_model(options.model, device=device), Path(options.model)


def from_run_config(file: str, settings: Settings) -> tuple[Settings, str, list[str]]:
    """What a training configuration says of the step: the settings, model.path and data.train."""
    config: PreferenceConfig | RewardConfig
    if settings.loss == "rm":
        config = load_config(RewardConfig, [file])
    else:
        config = load_config(PreferenceConfig, [file])
        settings = replace(settings, loss=config.loss.name, beta=config.loss.beta)
    optim = {name: getattr(config.optim, name) for name in ("batch_size", "micro_tokens", "lr")}
    names = ("dtype", "device", "threads", "compile", "activation_checkpointing")
    run = {name: getattr(config.run, name) for name in names}
    return replace(settings, **optim, **run), config.model.path, config.data.train


def with_reward_head(model: Transformer) -> RewardModel:
    """`model` as a reward model without language-modelling loss; its head is the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward = RewardModel.from_language_model(model)
    reward.lm_head = None
    return reward


def read_pairs(
    files: list[str], model: ModelConfig, directory: Path, max_length: int, count: int
) -> PairTokens:
    """The first `count` usable pairs of `files`, in the ids of the model's own tokenizer."""
    tokenizer = Tokenizer.from_directory(directory)
    data = DataSection(train=files, max_length=max_length, max_prompt_length=max_length * 3 // 4)
    require_fit("model", model, tokenizer, max_length)
    stream = stream_pairs("train", files, data, tokenizer, DataReport())
    pairs = PairTokens.from_pairs(pair for pair, _ in zip(stream, range(count), strict=False))
    say(f"data: {', '.join(files)}, the first {len(pairs)} usable pairs; {_lengths(pairs)}")
    return pairs


def random_pairs(config: ModelConfig, max_length: int, count: int, seed: int = 0) -> PairTokens:
    """Random ids with lengths like HH-RLHF's: log-normal quantiles in random order, so that few pairs are typical too."""
    rng = np.random.default_rng(seed)
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])

    def lengths(median: float, spread: float, most: np.ndarray | int) -> np.ndarray:
        return np.clip(np.exp(np.log(median) + spread * rng.permutation(normal)).astype(int), 2, most)

    prompts = lengths(95, 0.95, max_length * 3 // 4)
    endings = [lengths(60, 0.85, max_length - prompts) for _ in range(2)]
    pairs = pairs_of_lengths(config, np.stack([prompts, *endings], axis=1), seed)
    say(f"data: random ids, lengths log-normal like HH-RLHF's, clipped to {max_length}; {_lengths(pairs)}")
    return pairs


def pairs_of_lengths(config: ModelConfig, lengths: np.ndarray, seed: int = 0) -> PairTokens:
    """Random ids; lengths (pairs, 3): prompt, chosen, rejected. Every ending ends in EOS."""
    rng = np.random.default_rng(seed)

    def ids(length: int) -> list[int]:
        return rng.integers(min(3, config.vocab_size - 1), config.vocab_size, length).tolist()

    def made() -> Iterator[TokenPair]:
        for index, (prompt, chosen, rejected) in enumerate(lengths):
            yield TokenPair(ids(prompt), [*ids(chosen - 1), EOS], [*ids(rejected - 1), EOS], index)

    return PairTokens.from_pairs(made())


def _lengths(pairs: PairTokens) -> str:
    if not len(pairs):
        raise UserError("no usable pair in the data")
    return "prompt {:.0f}, chosen {:.0f}, rejected {:.0f} tokens on average".format(
        *pairs.lengths.mean(axis=0)
    )
