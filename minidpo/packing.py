"""Token ids -> one packed row: [prompt | response 1 | response 2 | ...] of each prompt, without padding.

    tokens      p p p p c c c r r | p p c c c c r r r | ...
    position    0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 5 2 3 4 | ...     each response continues its prompt
    response    0 0 0 0 1 1 1 2 2 | 0 0 1 1 1 1 2 2 2 | ...     0: the prompt

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
    """One packed row. An index of this class is one into its `tokens`."""

    tokens: Tensor  # (N,) int64
    # Which token is what; attention and rotary positions are derived from these three.
    prompt: Tensor  # (N,) the prompt that a token belongs to, 0 to P-1; padding: from P on
    response: Tensor  # (N,) 0 in a prompt, k in its k-th response
    position: Tensor  # (N,) place of a token in its own text
    # What is scored. `predictor` holds the shift by one: logits[predictor] predict `targets`.
    predictor: Tensor  # (S,) index of the token before each scored token
    targets: Tensor  # (S,) ids of the scored tokens
    # Per response
    last: Tensor  # (P, K) index of each response's last token, where a reward is read
    lengths: Tensor  # (P, K) scored tokens of each response, EOS included
    bounds: np.ndarray  # (P, K + 2) indices: where a prompt starts and ends, and where its responses end
    scored_responses: int  # how many responses of each prompt are scored, counted from the first

    @property
    def scored_lengths(self) -> Tensor:
        """The lengths of the scored responses, (P, scored_responses)."""
        return self.lengths[:, : self.scored_responses]

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on `device`; on a GPU its row is padded to whole blocks."""
        if device.type == "cpu":
            return self
        tensors = {n: values for n, values in vars(padded(self, BLOCK)).items() if isinstance(values, Tensor)}
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
    # A row of bounds is (prompt start, prompt end = response 1 start, response 1 end, response 2 end, ...).
    bounds = (pairs.bounds if indices is None else pairs.bounds[indices])[:, : 2 + responses]

    tokens, prompt, response, position, predictor, last = [], [], [], [], [], []
    n = 0  # The prompts stand one after the other: this is the index at which the next one starts.
    for p, (start, *ends) in enumerate(bounds.tolist()):
        # A prompt and its responses are already neighbours in pairs.ids, so one slice copies them all.
        tokens.append(pairs.ids[start : ends[-1]])
        prompt.append(np.full(ends[-1] - start, p))
        prompt_length = ends[0] - start
        response.append(np.zeros(prompt_length, int))
        position.append(np.arange(prompt_length))

        for k, (begin, end) in enumerate(zip(ends, ends[1:], strict=False), start=1):
            length, first = end - begin, n + begin - start
            response.append(np.full(length, k))
            # Every response continues its prompt, wherever it lies in the row.
            position.append(np.arange(prompt_length, prompt_length + length))
            if k <= scored:
                # The shift by one: the prompt's last token predicts the response's first token, and each
                # response token predicts the next one. The last one (EOS) predicts nothing.
                predictor.append(np.r_[n + prompt_length - 1, first : first + length - 1])
            last.append(first + length - 1)
        n += ends[-1] - start

    row_bounds, lengths = _in_row(bounds), np.diff(bounds[:, 1:], axis=1)  # (P, K + 2), (P, K)
    row_tokens, row_response, row_predictor = map(_concatenated, (tokens, response, predictor))
    is_scored = (row_response > 0) & (row_response <= scored)  # (N,)
    if pairs.unscored is not None:  # Nobody asks the model to predict what others said between its turns.
        by_others = _concatenated([pairs.unscored[start:end] for start, *_, end in bounds]).astype(bool)
        row_predictor = row_predictor[~by_others[is_scored]]
        is_scored &= ~by_others
        lengths -= count_marked(by_others, row_bounds)
    return PackedBatch(
        tokens=_tensor(row_tokens),
        prompt=_tensor(_concatenated(prompt)),
        response=_tensor(row_response),
        position=_tensor(_concatenated(position)),
        predictor=_tensor(row_predictor),
        targets=_tensor(row_tokens[is_scored]),
        last=_tensor(np.reshape(last, lengths.shape)),
        lengths=_tensor(lengths),
        bounds=row_bounds,
        scored_responses=scored,
    )


def padded(batch: PackedBatch, multiple: int) -> PackedBatch:
    """The batch with its row padded to a multiple of `multiple` tokens; an empty row gets one multiple."""
    n = len(batch.tokens)
    padding = torch.arange(-n % multiple if n else multiple)
    zeros = torch.zeros_like(padding)
    return replace(
        batch,
        tokens=torch.cat((batch.tokens, zeros)),
        # Every padding token is a prompt of its own: it attends to itself alone, and nothing attends to it.
        prompt=torch.cat((batch.prompt, len(batch.bounds) + padding)),
        response=torch.cat((batch.response, zeros)),
        position=torch.cat((batch.position, zeros)),
    )


def _in_row(bounds: np.ndarray) -> np.ndarray:
    """The bounds (P, K + 2) of texts in PairTokens.ids, moved to a row in which they follow one another."""
    sizes = bounds[:, -1] - bounds[:, 0]  # (P,) tokens of a prompt with its responses
    starts = np.cumsum(sizes) - sizes
    return bounds - bounds[:, :1] + starts[:, None]


def _concatenated(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, int)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int64))
