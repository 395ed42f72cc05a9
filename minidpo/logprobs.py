"""Log-probs of responses: first the definition, then the form that fits in memory.

Dimensions: R rows, T tokens a row, S scored tokens, V vocabulary, D hidden size.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # the definition below depends on torch alone
    from minidpo.model import Transformer
    from minidpo.packing import PackedRow

LOGITS = 2**28  # bytes of a chunk of logits, in the dtype of their product
CACHED = 2**21  # logits that are worked on in float32 at once, on a CPU: 8 MiB stay in its cache


def sequence_logps(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: summed log-probs of the scored tokens of each row, and how many there are.

        sums[r] = sum over t with response_mask[r, t] of log softmax(logits[r, t-1])[tokens[r, t]]

    The logits after token t-1 predict token t: of the textbook form, the shift by one happens here and nowhere else (packed
    rows shift in `pack_row`).
    The first token of a row has no predecessor and cannot be scored.
    Shapes: logits (R, T, V), tokens (R, T) integers, response_mask (R, T) bool, true on scored tokens.
    Returns sums (R,) in nats, float32 or better, and counts (R,) int64.
    Raises ValueError on shapes that do not fit, a scored first token, or a row with no scored token.
    """
    if logits.ndim != 3 or tokens.shape != logits.shape[:2] or response_mask.shape != tokens.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)} and response_mask"
            f" {tuple(response_mask.shape)} must be (R, T, V), (R, T) and (R, T)"
        )
    if response_mask[:, 0].any():
        raise ValueError("response_mask scores the first token of a row, which nothing predicts")
    scored = response_mask[:, 1:]
    counts = scored.sum(dim=1)
    if (counts == 0).any():
        raise ValueError(f"row {int((counts == 0).nonzero()[0])} has no scored token")
    logps = F.log_softmax(at_least_float32(logits[:, :-1]), dim=-1)
    token_logps = logps.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)  # (R, T-1)
    # where, not multiplication: a masked -inf times zero would be NaN.
    return torch.where(scored, token_logps, 0.0).sum(dim=1), counts


def token_logps(
    hidden: Tensor, output_weight: Tensor, targets: Tensor, chunk_size: int | None = None
) -> Tensor:
    """log softmax(hidden @ output_weight.T)[target] at every scored position, without storing the logits.

    Equal to `sequence_logps`'s inner gather on the same rows, but the (S, V) logits exist only `chunk_size` rows (by
    default `chunk_rows`) at a time: backward computes all but the last chunk's again. float32 from the logits on,
    whatever dtype the product ran in.
    Shapes: hidden (S, D), the final hidden state *before* each scored token; output_weight (V, D);
    targets (S,). Returns (S,), nats, float32 or better. Differentiable once in hidden and output_weight.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    most = chunk_size or chunk_rows(len(output_weight), hidden.dtype)
    chunks = max(1, -(-len(hidden) // most))
    # Even ones: the more the last one holds, the less is computed again.
    return _ChunkedTokenLogps.apply(hidden, output_weight, targets, max(1, -(-len(hidden) // chunks)))


def chunk_rows(vocab_size: int, dtype: torch.dtype) -> int:
    """How many rows of logits fit into LOGITS bytes."""
    return max(1, LOGITS // (vocab_size * dtype.itemsize))


def response_logps(model: "Transformer", row: "PackedRow") -> Tensor:
    """Summed log-probs of the scored endings of a packed row: (B, endings), nats, chosen first.

    The packed twin of `sequence_logps`: one pass over [prompt | chosen | rejected], logits at scored tokens only.
    """
    return sum_by_ending(scored_logps(model, row), row.scored_lengths).view(row.pairs, row.endings)


def scored_logps(model: "Transformer", row: "PackedRow") -> Tensor:
    """The terms of `response_logps`: the log-prob of every scored token of a packed row, (S,), nats."""
    return token_logps(scored_hidden(model, row), model.output_weight, row.targets)


def scored_hidden(model: "Transformer", row: "PackedRow") -> Tensor:
    """The final hidden state *before* every scored token of a packed row: (S, D)."""
    attends = row.attends(model.config.num_hidden_layers)
    return model.hidden_states(row.tokens, row.places.position, attends, row.queries)[row.scored]


def sum_by_ending(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs: values (S,) are those of ending 0, then ending 1, ...; lengths (E,) -> (E,).

    Added up in float64: hundreds of float32 terms on the way to -1000 nats would cost the fourth decimal.
    """
    ending = torch.repeat_interleave(
        torch.arange(len(lengths), device=values.device), lengths, output_size=len(values)
    )
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return sums.index_add(0, ending, values.double()).to(values.dtype)


class _ChunkedTokenLogps(torch.autograd.Function):
    """d logp / d logits = onehot(target) - softmax(logits), formed chunk by chunk.

    A chunk is large, for its three products; what is done to its logits in float32 is done a few rows at a time, which
    stay in the processor's cache and never need memory from the system. Backward goes from the last chunk to the first:
    that one's logits are still there, in the place that any chunk's would take.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, output_weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        logps, normalizers = [], []
        weight = output_weight.to(hidden.dtype)
        for h, chunk_targets in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
            logits = h @ weight.T  # (chunk, V)
            for rows in _few_rows(logits):
                few = at_least_float32(logits[rows])
                normalizers.append(few.logsumexp(dim=-1))
                target_logits = few.gather(-1, chunk_targets[rows, None]).squeeze(-1)
                logps.append(target_logits - normalizers[-1])
        ctx.chunk_size, ctx.last_logits = chunk_size, logits
        ctx.save_for_backward(hidden, output_weight, targets, torch.cat(normalizers))
        return torch.cat(logps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps: Tensor):
        hidden, output_weight, *of_rows = ctx.saved_tensors
        per_row = (*of_rows, grad_logps)
        grad_hidden = torch.empty_like(hidden)
        weight = output_weight.to(hidden.dtype)
        # Accumulated over chunks in float32: bf16 sums would lose the small contributions.
        grad_weight = torch.zeros_like(output_weight, dtype=grad_logps.dtype)
        # Taken away, for they are overwritten below: a second backward computes them again.
        kept, ctx.last_logits = ctx.last_logits, None
        for start in reversed(range(0, len(hidden), ctx.chunk_size)):
            chunk = slice(start, start + ctx.chunk_size)
            targets, normalizers, grads = (values[chunk, None] for values in per_row)
            # Logits first, their gradient where they stood.
            grad_logits = hidden[chunk] @ weight.T if kept is None else kept
            kept = None
            for rows in _few_rows(grad_logits):
                softmax = torch.sub(grad_logits[rows], normalizers[rows]).exp_()
                few = softmax.mul_(-grads[rows]).scatter_add_(1, targets[rows], grads[rows])
                grad_logits[rows] = few
            grad_hidden[chunk] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[chunk]
        return grad_hidden, grad_weight.to(output_weight.dtype), None, None


def _few_rows(logits: Tensor) -> list[slice]:
    """Cuts rows (chunk, V) into slices of about CACHED logits; not at all on a GPU, which wants few, large calls."""
    step = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(start, start + step) for start in range(0, max(1, len(logits)), step)]


def at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
