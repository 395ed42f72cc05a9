"""Log-probs of responses: first the definition, then the form that fits in memory.

Dimensions: R padded rows, T tokens per row, S scored tokens, Y responses, V vocabulary, D hidden size.
"""

from collections.abc import Callable
from functools import cache
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits are computed in chunks of this many bytes at most. In the backward pass each chunk adds a matrix as
# large as the output matrix to its gradient, so fewer and larger chunks are faster where memory allows.
CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**28}
# Within a chunk, this many logits at a time are converted to float32: on a CPU 8 MiB, which stay in its
# cache; on a GPU 256 MiB, because few large calls are faster there.
FLOAT32_LOGITS = {"cuda": 2**26, "cpu": 2**21}


def sequence_logps(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, for tests: summed log-probs of the scored tokens of each row, and their number.

        sums[r] = sum over t with response_mask[r, t] of log softmax(logits[r, t-1])[tokens[r, t]]

    The logits at position t-1 predict token t. For padded rows this shift by one is made here; for packed
    rows it is made in `pack` (PackedBatch.predictor), and tests compare the two. The first token of a row has
    no predecessor, so it cannot be scored.
    Shapes: logits (R, T, V), tokens (R, T) integers, response_mask (R, T) bool, true on scored tokens.
    Returns sums (R,) in nats, float32 or better, and counts (R,) int64.
    Raises ValueError for shapes that do not match, a scored first token, or a row without a scored token.
    """
    if logits.ndim != 3 or tokens.shape != logits.shape[:2] or response_mask.shape != tokens.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)} and response_mask"
            f" {tuple(response_mask.shape)} must be (R, T, V), (R, T) and (R, T)"
        )
    if response_mask[:, 0].any():
        raise ValueError("response_mask scores the first token of a row, which nothing predicts")

    # The shift by one: logits lose their last position; tokens and mask lose their first.
    scored = response_mask[:, 1:]  # (R, T-1)
    counts = scored.sum(dim=1)
    # A sum over no token would be 0, as if the response were certain.
    if (counts == 0).any():
        raise ValueError(f"row {int((counts == 0).nonzero()[0])} has no scored token")
    # float32, because bf16 would round a sum of -1200 nats to a multiple of 8.
    logps = F.log_softmax(at_least_float32(logits[:, :-1]), dim=-1)  # (R, T-1, V)
    logps_of_tokens = logps.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)  # (R, T-1)
    # torch.where, because a product with the mask would turn a masked -inf into NaN.
    return torch.where(scored, logps_of_tokens, 0.0).sum(dim=1), counts


def token_logps(
    hidden: Tensor, output_weight: Tensor, targets: Tensor, chunk_size: int | None = None
) -> Tensor:
    """log softmax(hidden @ output_weight.T)[target] of every scored token, without storing all logits.

    These are the log-probs that `sequence_logps` sums. The (S, V) logits are computed `chunk_size` rows at a
    time (default: `tokens_per_chunk`), and again in the backward pass. PyTorch's own
    linear_cross_entropy returns bf16 values for bf16 inputs, which is too coarse for sums of log-probs.
    Shapes: hidden (S, D), the final hidden state *before* each scored token; output_weight (V, D);
    targets (S,), the scored tokens.
    Returns (S,), nats, float32 or better. Differentiable once, in hidden and output_weight.
    """
    # A custom autograd function is not autocast: cast its input as F.linear would be under autocast.
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    most = chunk_size or tokens_per_chunk(len(output_weight), hidden.dtype, hidden.device.type)
    # Chunks of equal size: the logits of the last one are kept for the backward pass, which computes those of
    # the others again. The larger the last chunk, the more this saves.
    chunks = max(1, ceil(len(hidden) / most))
    return _ChunkedTokenLogps.apply(hidden, output_weight, targets, max(1, ceil(len(hidden) / chunks)))


def tokens_per_chunk(vocab_size: int, dtype: torch.dtype, device_type: str = "cpu") -> int:
    """How many tokens have logits that fit into CHUNK_BYTES together."""
    return max(1, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"]) // (vocab_size * dtype.itemsize))


def sum_by_response(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums per response. values (S,) are those of the first response, then of the second, ...; lengths (Y,)
    say how many belong to each; returns (Y,)."""
    # float64: a float32 sum of hundreds of terms that comes to -1000 nats is off in the fourth decimal.
    responses = torch.arange(len(lengths), device=values.device)
    response = torch.repeat_interleave(responses, lengths, output_size=len(values))  # (S,)
    sums = torch.zeros(len(lengths), dtype=widest_float(values.device), device=values.device)
    return sums.index_add(0, response, values.to(sums.dtype)).to(values.dtype)


def widest_float(device: torch.device) -> torch.dtype:
    """float64; on Apple's GPUs, which have none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class _ChunkedTokenLogps(torch.autograd.Function):
    """Forward and backward of `token_logps`, one chunk of logits at a time.

        log-prob of a token = its logit - logsumexp(logits)         d log-prob / d logits = onehot - softmax

    A chunk is large, because large matrix products are fast. Within a chunk, float32 work is done on a few
    rows at a time: see FLOAT32_LOGITS.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, output_weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        logps, normalizers = [], []
        weight = output_weight.to(hidden.dtype)
        for h, chunk_targets in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
            logits = h @ weight.T  # (chunk, V)
            logps_of = _compiled(_logps_of) if logits.is_cuda else _logps_of
            for rows in _few_rows(logits):
                rows_logps, rows_normalizers = logps_of(logits[rows], chunk_targets[rows, None])
                logps.append(rows_logps)
                normalizers.append(rows_normalizers)
        # Keep one number per token instead of V: softmax = exp(logits - normalizer). The logits of the last
        # chunk are kept as well, because they still fit, and save one matrix product.
        ctx.chunk_size, ctx.last_logits = chunk_size, logits
        ctx.save_for_backward(hidden, output_weight, targets, torch.cat(normalizers))
        return torch.cat(logps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logps: Tensor):
        hidden, output_weight, *saved_per_token = ctx.saved_tensors
        per_token = (*saved_per_token, grad_logps)  # targets, normalizers, gradients: (S,) each
        grad_hidden = torch.empty_like(hidden)
        weight = output_weight.to(hidden.dtype)
        # Summed over chunks in float32: a sum in bf16 would lose small contributions. A frozen output matrix
        # has no gradient, which would be as large as itself.
        trained = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(output_weight, dtype=grad_logps.dtype) if trained else None

        # From the last chunk to the first, because the logits of the last one are there already. They are
        # overwritten below, so a second backward pass computes them again.
        kept, ctx.last_logits = ctx.last_logits, None
        for start in reversed(range(0, len(hidden), ctx.chunk_size)):
            chunk = slice(start, start + ctx.chunk_size)
            targets, normalizers, grads = (values[chunk, None] for values in per_token)
            # The gradient replaces the logits in the same memory, (chunk, V).
            grad_logits = hidden[chunk] @ weight.T if kept is None else kept
            kept = None
            to_gradient = _compiled(_to_gradient_on_gpu) if grad_logits.is_cuda else _to_gradient
            for rows in _few_rows(grad_logits):
                to_gradient(grad_logits[rows], normalizers[rows], targets[rows], grads[rows])
            # The chain rule through logits = hidden @ weight.T.
            grad_hidden[chunk] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[chunk]
            del grad_logits  # before the next chunk is computed beside it
        if grad_weight is not None:
            grad_weight = grad_weight.to(output_weight.dtype)
        return grad_hidden, grad_weight, None, None


def _logps_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """logits (rows, V), targets (rows, 1) -> log-probs of the targets, and normalizers: (rows,) each."""
    logits = at_least_float32(logits)
    normalizers = logits.logsumexp(dim=-1)
    return logits.gather(-1, targets).squeeze(-1) - normalizers, normalizers


def _to_gradient(logits: Tensor, normalizers: Tensor, targets: Tensor, grads: Tensor) -> None:
    """Replace logits (rows, V) by (onehot - softmax) * grads, the gradient of each token's log-prob; the
    others are (rows, 1)."""
    softmax = torch.sub(logits, normalizers).exp_()
    logits.copy_(softmax.mul_(-grads).scatter_add_(1, targets, grads))


def _to_gradient_on_gpu(logits: Tensor, normalizers: Tensor, targets: Tensor, grads: Tensor) -> None:
    """The same in a form that PyTorch's compiler makes one pass of: a scatter is a kernel of its own."""
    softmax = torch.sub(logits, normalizers).exp()
    of_target = torch.arange(logits.shape[1], device=logits.device) == targets
    logits.copy_(softmax * -grads + torch.where(of_target, grads, 0.0))


@cache
def _compiled(body: Callable) -> Callable:
    # Uncompiled, each of its operations would read and write all logits once more.
    return torch.compile(body, dynamic=True)


def _few_rows(logits: Tensor) -> list[slice]:
    """Slices of the rows of logits (chunk, V), each of about FLOAT32_LOGITS logits."""
    most = FLOAT32_LOGITS.get(logits.device.type, FLOAT32_LOGITS["cpu"])
    step = max(1, most // logits.shape[1])
    if logits.is_cuda:
        # Rounded up: compiled code copies a slice that does not begin at a multiple of 16 bytes.
        step = 8 * ceil(step / 8)
    return [slice(start, start + step) for start in range(0, max(1, len(logits)), step)]
