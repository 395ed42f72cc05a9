"""What a model says of every prompt and its responses: log-probs or rewards, without gradients.

Each process computes its share of the prompts, and all return the whole.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.data import PairTokens, micro_batches
from minidpo.distributed import all_reduce_sum, rank, ranks
from minidpo.errors import NOT_FINITE, UserError
from minidpo.log import Progress
from minidpo.model import Transformer, response_logps
from minidpo.packing import PackedBatch, pack
from minidpo.training.device import autocast

MICRO_TOKENS = 8192  # tokens of one pass without gradients, where nobody says how many


def require_finite(values: np.ndarray | Tensor, directory: str | Path) -> None:
    """Raises UserError unless all that the model of `directory` gave are finite numbers."""
    if not torch.as_tensor(values).isfinite().all():
        raise UserError(f"{directory}: the model's numbers are not finite: {NOT_FINITE}")


@torch.no_grad()
def values_of_every_prompt(
    compute: Callable[[Any, PackedBatch], Tensor],
    model: Transformer,
    pairs: PairTokens,
    micro_tokens: int,
    device: torch.device,
    dtype: str,
    label: str = "",
    scored: int | None = None,
) -> np.ndarray:
    """compute(model, batch) -> (P, K) over all n prompts of `pairs`: (n, K) float32.

    scored: how many responses of each prompt meet the vocabulary, as for `pack`. A prompt with more tokens
    than micro_tokens is computed alone. With a label, a last line says how long it took.
    """
    own = micro_batches(np.arange(len(pairs)), pairs.token_counts(), micro_tokens, rank(), ranks())
    progress = Progress(label or "scoring", sum(map(len, own)), "prompts")
    values = torch.zeros(len(pairs), 0)
    for indices in own:
        batch = pack(pairs, indices, scored=scored).to(device)
        with autocast(device, dtype):
            computed = compute(model, batch).float().cpu()
        if not values.shape[1]:  # Only `compute` knows how many values a prompt has.
            values = torch.zeros(len(pairs), computed.shape[1])
        values[indices] = computed
        progress.advance(len(indices))
    progress.close(last_line=bool(label))
    return all_reduce_sum(values).numpy()


# Summed log-probs of every response: (n, K) float32, nats.
all_logps = partial(values_of_every_prompt, response_logps)
# Rewards of every response, of a reward model: (n, K) float32.
all_rewards = partial(values_of_every_prompt, lambda model, batch: model.forward_packed(batch)[0], scored=0)
