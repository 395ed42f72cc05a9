"""What `bench` measures: a model, pairs, our optimizer step on them, and the textbook's; and its clock."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.benchmark import Timer

from minidpo.data import PairTokens, Tokenizer, load_pairs, micro_batches, require_fit
from minidpo.errors import UserError
from minidpo.losses import BradleyTerry
from minidpo.model import ModelConfig, Transformer, pretrained, read_config
from minidpo.sections import DPOConfig, RewardConfig
from minidpo.textbook import dpo_step, pad
from minidpo.training.device import autocast, choose_device, compiles_layers
from minidpo.training.optim import adamw
from minidpo.training.scoring import all_logps
from minidpo.training.step import pair_logps, pair_rewards

SHAPES = {  # vocabulary, hidden size, MLP, layers, query heads, key/value heads, head size
    "A": (32_000, 512, 1408, 8, 8, 8, 64),
    "B": (8_192, 256, 704, 6, 4, 4, 64),
    "C": (49_152, 576, 1536, 30, 9, 3, 64),  # SmolLM2-135M
    "D": (151_936, 896, 4864, 24, 14, 2, 64),  # Qwen2.5-0.5B
}
PAD, EOS = 0, 2
# TFLOP/s in bf16 without sparsity, by a part of the GPU's name. The first that fits counts.
DATA_SHEETS = {
    **{"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "A10": 125},
    **{"L40S": 362, "L4": 121, "RTX 3090": 71, "RTX 4090": 165, "RTX 5090": 210},
}


@dataclass
class Case:
    """What is measured. It can be sent to another process, where peak memory is measured."""

    directory: Path  # of the language model, or of the reward model where the loss is BradleyTerry
    pairs: PairTokens
    config: Any  # DPOConfig or RewardConfig
    device: torch.device
    their_passes: int = 1  # passes that one step of TRL is cut into

    @property
    def rewards(self) -> bool:
        return isinstance(self.config.loss, BradleyTerry)

    def batches(self) -> list[np.ndarray]:
        """Row numbers of the pairs of each step."""
        return np.split(np.arange(len(self.pairs)), len(self.pairs) // self.config.optim.batch_size)

    def token_lists(self) -> list[tuple[list[int], ...]]:
        """The ids of prompt, chosen and rejected response of every pair."""
        return [(pair.prompt, *pair.responses) for pair in map(self.pairs.pair, range(len(self.pairs)))]


def make_case(options: Namespace, config: DPOConfig | RewardConfig, temporary: Path) -> Case:
    """Model and pairs as files and arrays, from which several steps and processes can start."""
    run = config.run
    device = choose_device(run.device, run.threads, run.dtype, run.attention)
    directory, count = Path(config.model.path), options.steps * config.optim.batch_size
    torch.manual_seed(0)
    if options.shape:
        model = ModelConfig(
            *SHAPES[options.shape], tie_word_embeddings=True, eos_token_id=EOS, pad_token_id=PAD
        )
        pretrained.save_model(Transformer(model), directory)
    if options.data or options.config:
        tokenizer = Tokenizer.from_pretrained(directory)
        require_fit("model", read_config(directory), tokenizer, config.data.max_length)
        pairs, _ = load_pairs(config.data, tokenizer, run.seed)
    else:
        pairs = random_pairs(read_config(directory), count)
    if len(pairs) < count:
        raise UserError(f"there are {len(pairs)} pairs, and --steps {options.steps} takes {count}; lower it")
    if isinstance(config.loss, BradleyTerry):
        reward_model = pretrained.new_reward_model(directory, language_modelling=False)
        pretrained.save_reward_model(reward_model, directory := temporary / "reward")
    return Case(directory, pairs.select(np.arange(count)), config, device, options.their_passes)


def random_pairs(config: ModelConfig, count: int) -> PairTokens:
    """Random ids, lengths like HH-RLHF's: log-normal quantiles in random order, so few are typical too."""
    rng, longest = np.random.default_rng(0), min(512, config.max_length)
    normal = [statistics.NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    normals = np.stack([rng.permutation(normal) for _ in range(3)], axis=1)  # prompt, chosen, rejected
    lengths = (np.array([95, 60, 60]) * np.exp(np.array([0.95, 0.85, 0.85]) * normals)).astype(int)  # (n, 3)
    prompts = lengths[:, :1].clip(2, longest * 3 // 4)
    responses = lengths[:, 1:].clip(2, longest - prompts)

    def ids(length: int) -> list[int]:
        return rng.integers(3, config.vocab_size, length).tolist()

    both = [[[*ids(length - 1), EOS] for length in pair] for pair in responses]
    return PairTokens.from_responses([ids(length) for length in prompts[:, 0]], both)


def our_step(case: Case) -> Callable[[np.ndarray], float]:
    """One optimizer step over a batch of pairs, as train_dpo.py and train_rm.py take it; it returns the mean
    loss of the batch, before the step."""
    pairs, loss, optim, run = case.pairs, case.config.loss, case.config.optim, case.config.run
    load = pretrained.load_reward_model if case.rewards else pretrained.load_model
    model = load(case.directory, device=case.device)
    model.activation_checkpointing = run.activation_checkpointing
    if compiles_layers(run.compile, case.device):
        model.compile_layers()
    optimizer, token_counts = adamw(model, optim), pairs.token_counts(loss.responses)  # that each lays out
    if loss.needs_reference:
        logps = all_logps(model, pairs, optim.micro_tokens, case.device, run.dtype)
        pairs = replace(pairs, ref_logps=logps)
    forward: Any = pair_rewards if case.rewards else pair_logps

    def step(batch: np.ndarray) -> float:
        total = torch.zeros((), device=case.device)
        for indices in micro_batches(batch, token_counts[batch], optim.micro_tokens):
            losses = loss(forward(model, pairs, indices, loss, case.device, run.dtype))
            (losses.sum() / len(batch)).backward()
            total += losses.detach().sum() / len(batch)
        clip_grad_norm_(model.parameters(), optim.grad_clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step


def textbook_step(case: Case) -> Callable[[np.ndarray], float]:
    """textbook.dpo_step with our weights, optimizer and precision. Its reference runs in each step."""
    pairs, config = case.token_lists(), case.config
    policy, reference = (pretrained.load_model(case.directory, device=case.device) for _ in range(2))
    optimizer = adamw(policy, config.optim)

    def logits(model: nn.Module, tokens: Tensor) -> Tensor:
        """(R, T, V) float32: autocast is for the forward pass, and bf16 log-probs would be too coarse."""
        with autocast(case.device, config.run.dtype):
            return model(tokens).float()

    def step(batch: np.ndarray) -> float:
        tokens, mask = (part.to(case.device) for part in pad([pairs[row] for row in batch]))
        models: list[Any] = [partial(logits, policy), partial(logits, reference)]
        return dpo_step(models[0], models[1], optimizer, tokens, mask, config.loss.beta)

    return step


STEPS = {"ours": our_step, "textbook": textbook_step}


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_peak(device: torch.device, dtype: str) -> float:
    """FLOPs per second of the fastest square matrix product of several sizes: a utilisation of 1."""
    best = 0.0
    for size in (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192):
        a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
        timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
        best = max(best, 2 * size**3 / min(timer.blocked_autorange(min_run_time=0.1).times))
    return best


def data_sheet_peak(device: torch.device, dtype: str) -> float | None:
    """FLOPs per second of dense bf16 products that the maker of a known GPU states; None for others."""
    if device.type != "cuda" or dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for gpu, peak in DATA_SHEETS.items() if gpu in name), None)
