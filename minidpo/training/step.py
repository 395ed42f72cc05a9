"""One micro-batch, from token ids to what a loss reads: pack the pairs, run the model, sum the log-probs.

The scripts train with these functions, and `bench` times them. B: pairs of the micro-batch.
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
    indices: np.ndarray,
    loss: PreferenceLoss,
    device: torch.device,
    dtype: str,
    z0: Tensor | None = None,
) -> PairLogps:
    """What `loss` reads about the pairs numbered `indices`. dtype: "bf16" or "fp32"; z0: one number, if the
    loss has a reference point."""
    # One forward pass over one packed row. A loss that reads only the chosen response leaves out the others.
    batch = pack(pairs, indices, loss.responses).to(device)
    with autocast(device, dtype):
        logps = response_logps(policy, batch)  # (B, responses)

    def columns(values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, responses) -> chosen (B,) and rejected (B,), or None if the loss reads only the chosen one."""
        return values[:, 0], values[:, 1] if loss.responses == 2 else None

    # The reference is frozen, so its log-probs, ref_logps (n, K), were computed before training.
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    if loss.needs_reference:
        if pairs.ref_logps is None:
            # Without them the loss would compare with nothing, which is another loss.
            raise ValueError(f"{loss.name} compares with a reference, and the pairs have no ref_logps")
        reference = columns(to_device(torch.from_numpy(pairs.ref_logps[indices]), device))
    return PairLogps(  # The first six by position: log-probs, those of the reference, lengths.
        *columns(logps),
        *reference,
        *columns(batch.lengths),
        margin=_margins(pairs, indices, device) if loss.margin_from_data else None,
        label=None if pairs.label is None else to_device(torch.from_numpy(pairs.label[indices]), device),
        z0=None if z0 is None else z0.to(logps.dtype).expand(len(indices)),
    )


def _margins(pairs: PairTokens, indices: np.ndarray, device: torch.device) -> Tensor | None:
    """(B,): the margins that the records of `indices` give; None if they give none."""
    if pairs.margin is None:
        return None
    # In float32, like the log-probs: the inputs of a loss have one dtype.
    return to_device(torch.from_numpy(pairs.margin[indices]).float(), device)


def pair_rewards(
    model: RewardModel,
    pairs: PairTokens,
    indices: np.ndarray,
    loss: BradleyTerry,
    device: torch.device,
    dtype: str,
) -> Rewards:
    """Rewards of both responses, and log-probs of the chosen one if the loss models language too."""
    # One forward pass gives both. Only the chosen response, the first, may need log-probs.
    batch = pack(pairs, indices, scored=1 if loss.lm_weight else 0).to(device)
    with autocast(device, dtype):
        rewards, logps = model.forward_packed(batch)  # (B, 2); (B, 1), None if nothing is scored
    margin = _margins(pairs, indices, device) if loss.margin_from_data else None
    chosen_logps = None if logps is None else logps[:, 0]
    return Rewards(rewards[:, 0], rewards[:, 1], margin, chosen_logps, batch.lengths[:, 0])
