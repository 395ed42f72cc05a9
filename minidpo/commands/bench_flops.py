"""What a step must compute, counted, and how fast this machine multiplies matrices.

A product of (m, k) and (k, n) costs 2 m k n. Counted: every product that no arrangement of the same mathematics can
leave out. Not counted: embeddings, norms, softmax, anything linear in the tokens; what activation checkpointing or the
output layer's chunks compute a second time.
"""

import time
from typing import NamedTuple

import numpy as np
import torch

from minidpo.model import ModelConfig
from minidpo.packing import Wanted


class Flops(NamedTuple):
    """Floating-point operations of one step over some pairs; backward is twice forward."""

    layers: int  # products with the layers' weights
    attention: int  # scores and weighted sums, of the pairs of tokens that may see each other
    output: int  # hidden states to logits, or to rewards

    @property
    def total(self) -> int:
        return sum(self)


def necessary_flops(config: ModelConfig, lengths: np.ndarray, wanted: Wanted) -> Flops:
    """Forward and backward over pairs of `lengths` (pairs, 3): prompt, chosen, rejected.

    The prompt passes once, an ending without its last token (which predicts nothing) unless its reward is wanted.
    In the last layer every token needs keys and values, but only rows that are read need queries, o_proj and MLP:
    those that predict a scored token (the last of the prompt once for both endings) and those that carry a reward.
    """
    prompt, *endings = lengths.astype(np.int64).T
    endings = endings[: 1 + wanted.rejected]
    scored = (wanted.chosen_logps, wanted.rejected_logps)[: len(endings)]
    passing = [ending - (not wanted.rewards) for ending in endings]
    tokens = int((prompt + sum(passing)).sum())
    # Rows read: inside the endings all but the last if scored, the last if rewarded; and the prompt's last.
    inside = [(e - 1) * s + wanted.rewards for e, s in zip(endings, scored, strict=True)]
    rows = int(sum(inside).sum()) + len(prompt) * any(scored)
    logits = int(sum((e - 1) * s for e, s in zip(endings, scored, strict=True)).sum()) + len(prompt) * any(
        scored
    )

    width, inner = config.hidden_size, config.intermediate_size
    queries_out = 2 * width * config.num_attention_heads * config.head_dim
    keys_values = 2 * width * config.num_key_value_heads * config.head_dim
    per_row = queries_out + 3 * width * inner  # q_proj, o_proj, gate, up, down
    earlier = config.num_hidden_layers - 1
    layers = 2 * (earlier * tokens * (per_row + keys_values) + tokens * keys_values + rows * per_row)

    # Keys seen: token i of the prompt i + 1, token i of an ending prompt + i + 1.
    seen = prompt * (prompt + 1) // 2 + sum(e * prompt + e * (e + 1) // 2 for e in passing)
    last_seen = prompt * any(scored)
    for ending, is_scored in zip(endings, scored, strict=True):
        last_seen = last_seen + is_scored * ((ending - 1) * prompt + (ending - 1) * ending // 2)
        last_seen = last_seen + wanted.rewards * (prompt + ending)
    each = 4 * config.num_attention_heads * config.head_dim  # a score, and its share of the weighted sum
    attention = each * int((earlier * seen + last_seen).sum())

    output = 2 * width * (config.vocab_size * logits + wanted.rewards * len(endings) * len(prompt))
    return Flops(3 * layers, 3 * attention, 3 * output)


def textbook_tokens(lengths: np.ndarray, wanted: Wanted) -> int:
    """Tokens of the same pairs as rows of their own, prompt and one ending each, without padding."""
    endings = 1 + wanted.rejected
    return int((endings * lengths[:, 0] + lengths[:, 1 : 1 + endings].sum(axis=1)).sum())


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The fastest square product of several sizes, in operations a second: what "100 %" means."""
    sizes = (512, 1024, 2048) if device.type == "cpu" else (2048, 4096, 8192)
    best = 0.0
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        until = time.perf_counter() + seconds / len(sizes)
        a @ b
        while True:
            synchronize(device)
            started = time.perf_counter()
            a @ b
            synchronize(device)
            ended = time.perf_counter()
            best = max(best, 2 * size**3 / (ended - started))
            if ended > until:
                break
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
