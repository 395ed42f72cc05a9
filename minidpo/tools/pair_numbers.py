"""Pairs in numbers: per token, summed, and what losses make of them. `explain` and `report` show them."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.data import PairTokens, Tokenizer, TokenPair, describe_pair
from minidpo.data.report import PARTS
from minidpo.logprobs import sum_by_response
from minidpo.losses import PairLogps, PreferenceLoss
from minidpo.model import load_model, response_token_logps
from minidpo.packing import pack
from minidpo.settings import keys_of
from minidpo.training.device import autocast
from minidpo.training.scoring import require_finite

# Of each scored token: its log-probs, and what they have added up to in its response.
NUMBERS = ("policy_logp", "reference_logp", "difference", "policy_sum", "reference_sum", "difference_sum")


def explanations(
    pairs: PairTokens,
    tokenizer: Tokenizer,
    losses: Sequence[PreferenceLoss],
    policy: str | Path,
    reference: str | Path | None,
    device: torch.device,
    dtype: str = "fp32",
    adapter: str | Path | None = None,
    z0: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Of each pair all its tokens, the sums, and what the losses make of it; `loss` is the first of them.

    Nothing is rounded: the numbers are the float32 that models and losses gave. Each pair is computed by
    itself, so that no other one changes a digit of it. reference: None stands for the policy itself.
    """
    batches = [pack(pairs, np.array([row])) for row in range(len(pairs))]

    @torch.no_grad()
    def token_logps(model: str | Path, adapter: str | Path | None = None) -> list[Tensor]:
        """Of each batch, the log-probs (S,) of its scored tokens under the model of a directory."""
        loaded = load_model(model, device=device, adapter=adapter)
        with autocast(device, dtype):
            logps = [response_token_logps(loaded, batch.to(device)).float().cpu() for batch in batches]
        require_finite(torch.cat(logps), model)
        return logps

    of_policy = token_logps(policy, adapter)
    of_reference = token_logps(reference) if reference else of_policy
    for row, (batch, ours, theirs) in enumerate(zip(batches, of_policy, of_reference, strict=True)):
        ids, lengths = pairs.pair(row), batch.lengths[0]  # (K,)
        file = pairs.files[ids.file] if pairs.files else None
        numbers: dict[str, Any] = {"data": file, "index": ids.index, "label": ids.label}
        known = {"margin": ids.margin, "label": ids.label, "z0": z0}
        logps = {name: torch.tensor([value]) for name, value in known.items() if value is not None}
        for of_model, (of_loss, values) in {"": ("", ours), "reference_": ("ref_", theirs)}.items():
            sums = sum_by_response(values, lengths)  # (K,)
            for k, name in enumerate(PARTS[1 : 1 + len(lengths)]):
                numbers[f"{of_model}{name}_logps"] = sums[k].item()
                logps[f"{of_loss}{name}"] = sums[k : k + 1]
                numbers[f"{name}_length"] = lengths[k].item()
                logps[f"{name}_length"] = lengths[k : k + 1]
        numbers["tokens"] = _token_table(ids, tokenizer, ours.numpy(), theirs.numpy())
        numbers["losses"] = [under(loss, PairLogps(**logps)) for loss in losses]
        numbers["loss"] = numbers["losses"][0]
        yield numbers


def under(loss: PreferenceLoss, pair: PairLogps) -> dict[str, Any]:
    """What `loss` makes of one pair (B = 1). Rewards and the loss are the run's own.

    argument: z or h of its equation, if it has one. sigmoid: of z, if that is the logit of a probability.
    """
    # In float64, because a weight of 1e-9 is still a weight.
    precise = PairLogps(*(v.double() if v is not None and v.is_floating_point() else v for v in pair))
    values: dict[str, Any] = {"name": loss.name} | {name: getattr(loss, name) for name in keys_of(loss)}
    if re.search(r"\b[zh]\b", loss.equation):
        values["argument"] = loss.z(precise).item()
    if loss.z_is_logit:
        values["sigmoid"] = loss.z(precise).sigmoid().item()
    if loss.needs_z0 and pair.z0 is not None:
        values["z0"] = pair.z0.item()
    if loss.responses == 2:
        chosen, rejected = loss.rewards(pair)
        values["chosen_reward"], values["rejected_reward"] = chosen.item(), rejected.item()
        values["margin"] = (chosen - rejected).item()
    values["loss"] = loss(pair).item()
    weights = [weight.item() for weight in loss.gradient_weights(precise)]
    return values | dict(zip(("chosen_weight", "rejected_weight"), [*weights, 0.0], strict=False))


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
    spelled = chain.from_iterable(characters(tokenizer, part) for part in (ids.prompt, *ids.responses))
    for token, spelling in zip(tokens, spelled, strict=True):
        token |= {"text": visible(tokenizer, token["id"]), "characters": spelling}
        token |= zip(NUMBERS, next(numbers), strict=True) if token["scored"] else {}
    return tokens


def visible(tokenizer: Tokenizer, token: int) -> str:
    """The text that one id stands for, with its leading space; its piece if it is special or stands for a
    part of a character."""
    piece, text = tokenizer.piece(token), tokenizer.decode([token])
    if "▁" in piece:  # Decoders that write a space so strip it from the beginning of a text.
        return piece.replace("▁", " ")
    return piece if not text or "\ufffd" in text else text


def characters(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """The text of each token in its place. Where a character is several tokens, the last one has all of it,
    and those before have none."""
    waiting: list[int] = []
    for place, token in enumerate(ids, start=1):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if "\ufffd" in text and len(waiting) < 4 and place < len(ids):  # UTF-8: at most four bytes
            yield ""
        else:
            yield text if len(waiting) > 1 else visible(tokenizer, token)
            waiting = []
