"""From a few pairs to the numbers that a loss reads: pack them, run the model, add up log-probs.

The scripts train with these functions, and `bench` times them.
"""

import numpy as np
import torch
from torch import Tensor

from minidpo.data import PairTokens
from minidpo.losses import BradleyTerry, PairLogps, PreferenceLoss, Rewards
from minidpo.model import RewardModel, Transformer, response_logps
from minidpo.packing import pack, to_device
from minidpo.training.device import autocast


def pair_logps(
    policy: Transformer,
    pairs: PairTokens,
    rows: np.ndarray,
    loss: PreferenceLoss,
    device: torch.device,
    dtype: str,
) -> PairLogps:
    """The log-probs that `loss` reads of the pairs numbered `rows`: one forward pass over one packed row.

    The reference's log-probs are a column of the data. dtype: "bf16" or "fp32".
    """
    batch = pack(pairs, rows, loss.responses).to(device)
    with autocast(device, dtype):
        logps = response_logps(policy, batch)  # (B, responses)

    def columns(values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of chosen and rejected; None where the loss reads the chosen response alone."""
        return values[:, 0], values[:, 1] if loss.responses == 2 else None

    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    if loss.needs_reference:
        if pairs.ref_logps is None:
            raise ValueError(f"{loss.name} compares with a reference, and the pairs have no ref_logps")
        reference = columns(to_device(torch.from_numpy(pairs.ref_logps[rows]), device))
    return PairLogps(*columns(logps), *reference, *columns(batch.lengths))


def pair_rewards(
    model: RewardModel,
    pairs: PairTokens,
    rows: np.ndarray,
    loss: BradleyTerry,
    device: torch.device,
    dtype: str,
) -> Rewards:
    """Rewards of both responses, and the log-probs of the chosen one if the loss has a language-modelling
    term.

    All come from one forward pass over one packed row.
    """
    batch = pack(pairs, rows, scored=1 if loss.lm_weight else 0).to(device)
    with autocast(device, dtype):
        rewards, logps = model.forward_packed(batch)  # (B, 2), (B, 1)
    margin = pairs.margins(rows) if loss.margin_from_data else None
    margin = None if margin is None else to_device(margin, device)
    chosen_logps = None if logps is None else logps[:, 0]
    return Rewards(rewards[:, 0], rewards[:, 1], margin, chosen_logps, batch.lengths[:, 0])
