"""Token ids to one packed row: [prompt | response 1 | response 2 | ...] of every prompt, without padding.

    tokens      p p p p c c c r r | p p c c c c r r r | ...
    positions   0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 5 2 3 4 | ...     each response continues its prompt
    response    0 0 0 0 1 1 1 2 2 | 0 0 1 1 1 1 2 2 2 | ...     0: the prompt

A text is a prompt with one of its responses. The logits after a token predict the next token of its text, so
the last prompt token predicts the first token of every response. A prompt may have any number of responses:
one (SFT, sampled text), two (a pair), n (best of n).
Dimensions: N tokens, P prompts with K responses each, S scored tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.data import PairTokens

BLOCK = 128  # FlexAttention's block size: rows on a GPU are whole blocks


@dataclass(frozen=True)
class PackedBatch:
    tokens: Tensor  # (N,) int64
    prompt: Tensor  # (N,) to which prompt a token belongs
    response: Tensor  # (N,) 0 in a prompt, k in its k-th response
    position: Tensor  # (N,) place of a token in its own text, which is the prompt and one response
    # For each scored token, the row index of the token before it: the logits there predict the scored token
    predicts: Tensor  # (S,)
    targets: Tensor  # (S,) the scored tokens
    last: Tensor  # (P, K) the row index of each response's last token, where a reward is read
    lengths: Tensor  # (P, K) tokens of each response, EOS included
    bounds: np.ndarray  # (P, K + 2) where each prompt begins and ends in the row, and where its responses end
    scored: int  # how many of a prompt's responses are scored

    @property
    def scored_lengths(self) -> Tensor:
        """(P, scored): the lengths of the scored responses."""
        return self.lengths[:, : self.scored]

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on `device`; on a GPU its row is filled up to whole blocks."""
        if device.type == "cpu":
            return self
        tensors = {n: values for n, values in vars(padded(self, BLOCK)).items() if isinstance(values, Tensor)}
        moved: dict[str, Any] = {name: to_device(values, device) for name, values in tensors.items()}
        return replace(self, **moved)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """To a GPU from pinned memory, because a copy from other memory would wait for the pass before."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def pack(
    pairs: PairTokens,
    rows: np.ndarray | None = None,
    responses: int | None = None,
    scored: int | None = None,
) -> PackedBatch:
    """Lay out the pairs numbered `rows` (default: all) as one packed row.

    responses: how many responses of each prompt are laid out, the first ones; default all.
    scored: how many of those are scored by the language model; default all.
    """
    bounds = pairs.bounds if rows is None else pairs.bounds[rows]
    bounds = bounds[:, : 2 + (bounds.shape[1] - 2 if responses is None else responses)]
    scored = bounds.shape[1] - 2 if scored is None else scored

    tokens, prompt, response, position, predicts, last = [], [], [], [], [], []
    n = 0  # tokens laid out so far
    for p, (start, *ends) in enumerate(bounds.tolist()):
        tokens.append(pairs.ids[start : ends[-1]])
        prompt.append(np.full(ends[-1] - start, p))
        prompt_length = ends[0] - start
        response.append(np.zeros(prompt_length, int))
        position.append(np.arange(prompt_length))
        for k, (begin, end) in enumerate(zip(ends, ends[1:], strict=False), start=1):
            length, first = end - begin, n + begin - start
            response.append(np.full(length, k))
            position.append(np.arange(prompt_length, prompt_length + length))
            if k <= scored:
                # The prompt's last token, then all tokens of the response but its last.
                predicts.append(np.r_[n + prompt_length - 1, first : first + length - 1])
            last.append(first + length - 1)
        n += ends[-1] - start

    sizes = bounds[:, -1] - bounds[:, 0]  # tokens that each prompt lays out
    starts = np.cumsum(sizes) - sizes
    lengths = np.diff(bounds[:, 1:], axis=1)
    of_row = _concatenated(tokens)
    which = _concatenated(response)
    return PackedBatch(
        tokens=_tensor(of_row),
        prompt=_tensor(_concatenated(prompt)),
        response=_tensor(which),
        position=_tensor(_concatenated(position)),
        predicts=_tensor(_concatenated(predicts)),
        targets=_tensor(of_row[(which > 0) & (which <= scored)]),
        last=_tensor(np.reshape(last, lengths.shape)),
        lengths=_tensor(lengths),
        bounds=bounds - bounds[:, :1] + starts[:, None],
        scored=scored,
    )


def padded(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with its row filled up to a multiple of so many tokens, at least one multiple.

    Every padding token is a prompt of its own, so it attends to itself alone and nothing attends to it.
    """
    n = len(batch.tokens)
    padding = torch.arange(-n % multiple if n else multiple)
    zeros = torch.zeros_like(padding)
    return replace(
        batch,
        tokens=torch.cat((batch.tokens, zeros)),
        prompt=torch.cat((batch.prompt, len(batch.bounds) + padding)),
        response=torch.cat((batch.response, zeros)),
        position=torch.cat((batch.position, zeros)),
    )


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, int)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int64))
