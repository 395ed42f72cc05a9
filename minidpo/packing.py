"""Token ids -> one packed row: [prompt | response 1 | response 2 | ...] of each prompt, without padding.

    tokens      p p p p c c c r r | p p c c c c r r r | ...     two prompts with two responses each
    position    0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 5 2 3 4 | ...     each response continues its prompt
    number      0 0 0 0 1 1 1 2 2 | 0 0 1 1 1 1 2 2 2 | ...     of the response; 0: the prompt

A text is a prompt with one of its responses. The logits after a token predict the next token of its text, so
the last prompt token predicts the first token of every response. A prompt may have any number of responses:
one (SFT, sampled responses), two (a preference pair), n (best of n). In a response of several turns, the
model reads what others said between its own turns, but is not scored on it.
Dimensions: N tokens of the row, P prompts with K responses each, S scored tokens: those with a log-prob.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.data import PairTokens
from minidpo.data.pair_tokens import count_marked

BLOCK = 128  # FlexAttention's block size: rows on a GPU are whole blocks


@dataclass(frozen=True)
class PackedBatch:
    """One packed row. All indices below are positions in its `tokens`."""

    tokens: Tensor  # (N,) int64
    position: Tensor  # (N,) place of a token in its own text, by which queries and keys are rotated
    # What is scored. `predictor` holds the shift by one: logits[predictor] predict `targets`.
    predictor: Tensor  # (S,) index of the token before each scored token
    targets: Tensor  # (S,) ids of the scored tokens
    # Per response
    last: Tensor  # (P, K) index of each response's last token, where a reward is read
    lengths: Tensor  # (P, K) scored tokens of each response, EOS included
    bounds: np.ndarray  # (P, K + 2) indices: where a prompt starts and ends, and where its responses end
    scored_responses: int  # how many responses of each prompt are scored, counted from the first

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on `device`; on a GPU its row is padded to whole blocks."""
        if device.type == "cpu":
            return self
        tensors = {name: values for name, values in vars(padded(self)).items() if isinstance(values, Tensor)}
        moved: dict[str, Any] = {name: to_device(values, device) for name, values in tensors.items()}
        return replace(self, **moved)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, copied to a GPU without waiting for the work it is still busy with."""
    # Only a copy from pinned memory can be non-blocking.
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def pack(
    pairs: PairTokens,
    indices: np.ndarray | None = None,
    responses: int | None = None,
    scored: int | None = None,
) -> PackedBatch:
    """Lay out the pairs numbered `indices` (default: all) as one packed row.

    responses: how many responses of each prompt are laid out, counted from the first; default: all. Raises
    ValueError if it has fewer. scored: how many of those get log-probs, counted from the first; default: all.
    """
    responses = pairs.responses if responses is None else responses
    scored = responses if scored is None else scored
    if responses > pairs.responses:
        raise ValueError(f"{responses} responses of each prompt are needed, the data has {pairs.responses}")
    # Bounds as indices into pairs.ids: prompt start, prompt end = response 1 start, response 1 end, ...
    in_ids = (pairs.bounds if indices is None else pairs.bounds[indices])[:, : 2 + responses]
    # A prompt and its responses are neighbours in pairs.ids, so a slice holds them; ids[:0] if there is none.
    slices = [slice(start, end) for start, *_, end in in_ids.tolist()]
    tokens = np.concatenate([pairs.ids[:0], *(pairs.ids[its] for its in slices)])
    # The same as indices into the row, where one prompt with its responses follows another.
    totals = in_ids[:, -1] - in_ids[:, 0]  # (P,) tokens of each prompt with its responses
    bounds = in_ids - in_ids[:, :1] + (np.cumsum(totals) - totals)[:, None]  # (P, K + 2)
    sizes = np.diff(bounds, axis=1)  # (P, K + 1): tokens of each prompt and of its responses

    # Of every token, (N,): its index; where its prompt or response begins; the number of its response, 0 in a
    # prompt; where its prompt begins and ends.
    index, first = np.arange(len(tokens)), np.repeat(bounds[:, :-1].flatten(), sizes.flatten())
    number = np.repeat(np.tile(np.arange(1 + responses), len(bounds)), sizes.flatten())
    prompt_start, prompt_end = np.repeat(bounds[:, :2], totals, axis=0).T
    # Every response continues its prompt, wherever it lies in the row.
    position = index - first + np.where(number > 0, prompt_end - prompt_start, 0)
    # The shift by one: the prompt's last token predicts the first token of each response, and each response
    # token predicts the next one. The last one (EOS) predicts nothing.
    predictor = np.where(index == first, prompt_end, index) - 1

    is_scored, lengths = (number > 0) & (number <= scored), sizes[:, 1:]
    if pairs.unscored is not None:  # Nobody asks the model to predict what others said between its turns.
        by_others = np.concatenate([pairs.unscored[:0], *(pairs.unscored[its] for its in slices)])
        is_scored, lengths = is_scored & ~by_others, lengths - count_marked(by_others, bounds)
    return PackedBatch(
        tokens=_tensor(tokens),
        position=_tensor(position),
        predictor=_tensor(predictor[is_scored]),
        targets=_tensor(tokens[is_scored]),
        last=_tensor(bounds[:, 2:] - 1),
        lengths=_tensor(lengths),
        bounds=bounds,
        scored_responses=scored,
    )


def padded(batch: PackedBatch) -> PackedBatch:
    """The batch with its row padded to whole blocks; an empty row gets one block."""
    n = len(batch.tokens)
    zeros = torch.zeros(-n % BLOCK if n else BLOCK, dtype=torch.int64)
    return replace(
        batch, tokens=torch.cat((batch.tokens, zeros)), position=torch.cat((batch.position, zeros))
    )


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))
