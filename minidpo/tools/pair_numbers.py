"""One pair in numbers: per token, summed, and what a loss makes of them. `explain` and `report` show them."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.data import Tokenizer, TokenPair
from minidpo.data.report import PARTS
from minidpo.data.truncation import describe_pair
from minidpo.logprobs import sum_by_response
from minidpo.losses import PairLogps, PreferenceLoss
from minidpo.model import load_model, response_token_logps
from minidpo.packing import PackedBatch
from minidpo.settings import keys_of
from minidpo.tools.explain_text import NUMBERS, characters, visible
from minidpo.training.device import autocast
from minidpo.training.scoring import require_finite


@torch.no_grad()
def token_logps(
    model: str,
    batches: list[PackedBatch],
    device: torch.device,
    dtype: str,
    adapter: str | Path | None = None,
) -> list[Tensor]:
    """Of each batch, the log-probs (S,) of its scored tokens under the model of a directory."""
    loaded = load_model(model, device=device, adapter=adapter)
    with autocast(device, dtype):
        logps = [response_token_logps(loaded, batch.to(device)).float().cpu() for batch in batches]
    require_finite(torch.cat(logps), model)
    return logps


def numbers_of(
    ids: TokenPair, tokenizer: Tokenizer, batch: PackedBatch, policy: Tensor, reference: Tensor
) -> tuple[dict[str, Any], PairLogps]:
    """What the log-probs (S,) of a pair's scored tokens add up to; and the same for a loss (B = 1)."""
    lengths = batch.lengths[0]  # (K,)
    sums, reference_sums = (sum_by_response(logps, lengths) for logps in (policy, reference))
    numbers: dict[str, Any] = {"tokens": _token_table(ids, tokenizer, policy.numpy(), reference.numpy())}
    known = {"margin": ids.margin, "label": ids.label}
    logps = {name: torch.tensor([value]) for name, value in known.items() if value is not None}
    for k, name in enumerate(PARTS[1 : 1 + len(lengths)]):
        numbers[f"{name}_logps"] = sums[k].item()
        numbers[f"reference_{name}_logps"] = reference_sums[k].item()
        numbers[f"{name}_length"] = lengths[k].item()
        logps |= {name: sums[k : k + 1], f"ref_{name}": reference_sums[k : k + 1]}
        logps[f"{name}_length"] = lengths[k : k + 1]
    return numbers, PairLogps(**logps)


def under(loss: PreferenceLoss, pair: PairLogps) -> dict[str, Any]:
    """What `loss` makes of one pair (B = 1). Rewards and the loss are the run's own.

    argument: what the loss is a function of. sigmoid: of the argument, if it is the logit of a probability.
    """
    # In float64, because a weight of 1e-9 is still a weight.
    precise = PairLogps(*(v.double() if v is not None and v.is_floating_point() else v for v in pair))
    values: dict[str, Any] = {"name": loss.name} | {name: getattr(loss, name) for name in keys_of(loss)}
    values["argument"] = loss.z(precise).item()
    if loss.z_is_logit:
        values["sigmoid"] = loss.z(precise).sigmoid().item()
    if loss.responses == 2:
        chosen, rejected = loss.rewards(pair)
        values["chosen_reward"], values["rejected_reward"] = chosen.item(), rejected.item()
        values["margin"] = (chosen - rejected).item()
    values["loss"] = loss(pair).item()
    weights = [weight.item() for weight in loss.gradient_weights(precise)]
    values["chosen_weight"], values["rejected_weight"] = weights if loss.responses == 2 else (*weights, 0.0)
    return values


def _token_table(
    ids: TokenPair, tokenizer: Tokenizer, policy: np.ndarray, reference: np.ndarray
) -> list[dict[str, Any]]:
    """One entry per token, in the order of the packed row. A response's last sums are those of `score`."""

    tokens = list(describe_pair(ids, tokenizer))
    of_chosen = sum(token["scored"] and token["response"] == "chosen" for token in tokens)

    def sums(logps: np.ndarray) -> np.ndarray:  # in float64, then rounded to float32, as sum_by_response does
        parts = np.split(logps, [of_chosen])
        return np.concatenate([part.cumsum(dtype=np.float64) for part in parts]).astype(np.float32)

    policy_sum, reference_sum = sums(policy), sums(reference)
    columns = (policy, reference, policy - reference, policy_sum, reference_sum, policy_sum - reference_sum)
    numbers = iter(np.stack(columns, axis=1).tolist())
    table = []
    spelled = chain.from_iterable(characters(tokenizer, getattr(ids, part) or []) for part in PARTS)
    for token in tokens:
        token["text"], token["characters"] = visible(tokenizer, token["id"]), next(spelled)
        table.append(token | (dict(zip(NUMBERS, next(numbers), strict=True)) if token["scored"] else {}))
    return table
