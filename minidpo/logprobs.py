"""Log-probs of responses: first the definition, then the form that fits in memory.

Dimensions: R rows, T tokens per row, S scored tokens, V vocabulary, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = 2**28  # bytes of one chunk of logits at most (they are bf16 under autocast)
CACHED = 2**21  # logits that a CPU works on in float32 at once: 8 MiB stay in its cache


def sequence_logps(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: summed log-probs of the scored tokens of each row, and how many there are.

        sums[r] = sum over t with response_mask[r, t] of log softmax(logits[r, t-1])[tokens[r, t]]

    The logits after token t-1 predict token t. Padded rows are shifted by one here; the shift of packed rows
    is in `pack` (`predicts`), and the tests hold them against this definition. The first token of a row has
    no predecessor and cannot be scored.
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
    logps_of_tokens = logps.gather(-1, tokens[:, 1:].unsqueeze(-1)).squeeze(-1)  # (R, T-1)
    # torch.where and not a product with the mask, because a masked -inf times zero is NaN.
    return torch.where(scored, logps_of_tokens, 0.0).sum(dim=1), counts


def token_logps(
    hidden: Tensor, output_weight: Tensor, targets: Tensor, chunk_size: int | None = None
) -> Tensor:
    """log softmax(hidden @ output_weight.T)[target] of every scored token, without storing the logits.

    Equal to the gather in `sequence_logps`, but the (S, V) logits exist only `chunk_size` rows at a time (by
    default `chunk_rows`): backward computes all chunks but the last again. float32 from the logits on,
    whatever dtype the product ran in. (torch.nn.functional.linear_cross_entropy returns bf16 values for bf16
    inputs, in which a response of -1000 nats is rounded to steps of 8, so this form stays.)
    Shapes: hidden (S, D), the final hidden state *before* each scored token; output_weight (V, D); targets
    (S,).
    Returns (S,), nats, float32 or better. Differentiable once in hidden and output_weight.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    most = chunk_size or chunk_rows(len(output_weight), hidden.dtype)
    chunks = max(1, -(-len(hidden) // most))
    # Chunks of equal size: the more rows the last one holds, the fewer are computed again.
    return _ChunkedTokenLogps.apply(hidden, output_weight, targets, max(1, -(-len(hidden) // chunks)))


def chunk_rows(vocab_size: int, dtype: torch.dtype) -> int:
    """How many rows of logits fit into LOGITS bytes."""
    return max(1, LOGITS // (vocab_size * dtype.itemsize))


def sum_by_response(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums over consecutive responses: values (S,) are those of response 0, then 1, ...; lengths (R,) ->
    (R,).

    The sums are taken in float64: hundreds of float32 terms on the way to -1000 nats would cost the fourth
    decimal.
    """
    responses = torch.arange(len(lengths), device=values.device)
    response = torch.repeat_interleave(responses, lengths, output_size=len(values))  # (S,)
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return sums.index_add(0, response, values.double()).to(values.dtype)


def at_least_float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


class _ChunkedTokenLogps(torch.autograd.Function):
    """The gradient of log-probs in logits is onehot(target) - softmax(logits), formed chunk by chunk.

    A chunk is large, because large matrix products are fast. What is done to its logits in float32 is done a
    few rows at a time, which stay in the processor's cache. Backward goes from the last chunk to the first:
    the logits of the last one are still in memory, so they are not computed again.
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
        hidden, output_weight, *saved_per_row = ctx.saved_tensors
        per_row = (*saved_per_row, grad_logps)  # targets, normalizers, gradients: (S,) each
        grad_hidden = torch.empty_like(hidden)
        weight = output_weight.to(hidden.dtype)
        # Added up over chunks in float32: a sum in bf16 would lose the small contributions.
        grad_weight = torch.zeros_like(output_weight, dtype=grad_logps.dtype)
        # The kept logits are overwritten below, so they serve once; a second backward computes them again.
        kept, ctx.last_logits = ctx.last_logits, None
        for start in reversed(range(0, len(hidden), ctx.chunk_size)):
            chunk = slice(start, start + ctx.chunk_size)
            targets, normalizers, grads = (values[chunk, None] for values in per_row)
            # This tensor holds the logits first, then their gradient in the same memory.
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
    """Cuts rows (chunk, V) into slices of about CACHED logits; one slice on a GPU, which wants few, large
    calls."""
    step = max(1, CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return [slice(start, start + step) for start in range(0, max(1, len(logits)), step)]
