"""Ways to get minidpo/logprobs.py wrong: text that stands once in it, and by name what replaces it."""

GATHERER_MUTATIONS = {
    # the definition
    "tokens[:, 1:].unsqueeze(-1)": {
        "no shift": "tokens[:, :-1].unsqueeze(-1)",
        "next token but one": "tokens[:, 1:].roll(-1, 1).unsqueeze(-1)",
    },
    "F.log_softmax(at_least_float32(logits[:, :-1]), dim=-1)": {
        "logits from the token itself": "F.log_softmax(at_least_float32(logits[:, 1:]), dim=-1)",
        "softmax over positions": "F.log_softmax(at_least_float32(logits[:, :-1]), dim=1)",
        "no softmax": "at_least_float32(logits[:, :-1])",
        "softmax without its log": "F.softmax(at_least_float32(logits[:, :-1]), dim=-1)",
        "log-softmax in bf16": "F.log_softmax(logits[:, :-1], dim=-1).float()",
        "sum in bf16": "F.log_softmax(logits[:, :-1], dim=-1)",
        "logits detached": "F.log_softmax(at_least_float32(logits[:, :-1]).detach(), dim=-1)",
    },
    "scored = response_mask[:, 1:]": {
        "mask not shifted": "scored = response_mask[:, :-1]",
        "mask shifted twice": "scored = response_mask[:, 1:].roll(-1, 1)",
    },
    "torch.where(scored, token_logps, 0.0).sum(dim=1)": {
        "mask ignored": "token_logps.sum(dim=1)",
        "prompt scored instead": "torch.where(scored, 0.0, token_logps).sum(dim=1)",
        "mask by multiplication": "(scored * token_logps).sum(dim=1)",
        "mean over the padded length": "torch.where(scored, token_logps, 0.0).mean(dim=1)",
        "mean over the scored": "torch.where(scored, token_logps, 0.0).sum(dim=1) / counts",
        "sum of probabilities": "torch.where(scored, token_logps.exp(), 0.0).sum(dim=1)",
    },
    "counts = scored.sum(dim=1)": {
        "counts one too many": "counts = scored.sum(dim=1) + (scored.sum(dim=1) > 0).long()",
        "counts of the whole row": "counts = (scored.sum(dim=1) > 0) * response_mask.shape[1]",
        "counts in floating point": "counts = scored.sum(dim=1).float()",
    },
    "if response_mask[:, 0].any():": {"a scored first token allowed": "if response_mask[:, 0].all():"},
    "if (counts == 0).any():": {"one empty row allowed": "if (counts == 0).all():"},
    " or response_mask.shape != tokens.shape": {"the mask's shape unchecked": ""},
    " or tokens.shape != logits.shape[:2]": {"the tokens' shape unchecked": ""},
    "logits.ndim != 3 or ": {"the logits' rank unchecked": ""},
    # the chunked form: forward
    "logps.append(target_logits - normalizers[-1])": {
        "normaliser added": "logps.append(target_logits + normalizers[-1])",
        "normaliser dropped": "logps.append(target_logits)",
    },
    "normalizers.append(few.logsumexp(dim=-1))": {
        "one normaliser for a few rows": "normalizers.append(few.logsumexp(dim=-1).mean().expand(len(few)))",
        "overflowing normaliser": "normalizers.append(few.exp().sum(dim=-1).log())",
    },
    "targets.split(chunk_size), strict=True": {
        "targets shifted by one": "targets.roll(1).split(chunk_size), strict=True",
        "first chunk only": "targets.split(chunk_size)[:1]",
    },
    "chunk_targets[rows, None]": {
        "targets of the chunk's first rows": "chunk_targets[: rows.stop - rows.start, None]"
    },
    "few = at_least_float32(logits[rows])": {
        "logits left in bf16": "few = logits[rows]",
        "logits halved": "few = 0.5 * at_least_float32(logits[rows])",
        "logits of the chunk's first rows": "few = at_least_float32(logits[: rows.stop - rows.start])",
    },
    # the chunked form: backward
    "kept, ctx.last_logits = ctx.last_logits, None": {
        "overwritten logits in a second backward": "kept = ctx.last_logits",
    },
    "            kept = None\n": {"the last chunk's logits for every chunk": ""},
    "reversed(range(0, len(hidden), ctx.chunk_size))": {
        "the last chunk's logits for the first": "range(0, len(hidden), ctx.chunk_size)",
    },
    "torch.sub(grad_logits[rows], normalizers[rows]).exp_()": {
        "softmax not normalised": "grad_logits[rows].to(grads.dtype).exp_()",
        "softmax normalised by another row": "torch.sub(grad_logits[rows], normalizers.roll(1, 0)[rows]).exp_()",
        "softmax dropped": "torch.zeros_like(grad_logits[rows], dtype=grads.dtype)",
        "log-softmax for softmax": "torch.sub(grad_logits[rows], normalizers[rows])",
    },
    "softmax.mul_(-grads[rows])": {
        "softmax's sign": "softmax.mul_(grads[rows])",
        "softmax without the incoming gradient": "softmax.neg_()",
        "softmax with another row's gradient": "softmax.mul_(-grads.roll(1, 0)[rows])",
        "softmax with the gradient squared": "softmax.mul_(-(grads[rows] ** 2))",
    },
    "scatter_add_(1, targets[rows], grads[rows])": {
        "one-hot of the other sign": "scatter_add_(1, targets[rows], -grads[rows])",
        "one-hot twice": "scatter_add_(1, targets[rows], 2 * grads[rows])",
        "one-hot dropped": "contiguous()",
        "one-hot of another row": "scatter_add_(1, targets.roll(1, 0)[rows], grads[rows])",
        "one-hot without the incoming gradient": "scatter_add_(1, targets[rows], torch.ones_like(grads[rows]))",
        "one-hot with the mean gradient": "scatter_add_(1, targets[rows], grads.mean().expand_as(grads[rows]).contiguous())",
    },
    "grad_logits[rows] = few": {"logits for their gradient": "pass"},
    "(values[chunk, None] for values in per_row)": {
        "rows of the first chunk": "(values[: chunk.stop - chunk.start, None] for values in per_row)",
    },
    "grad_weight += grad_logits.T @ hidden[chunk]": {
        "weight gradient of the last chunk alone": "grad_weight = grad_logits.T @ hidden[chunk]",
        "weight gradient of the other sign": "grad_weight -= grad_logits.T @ hidden[chunk]",
    },
    "grad_logits = hidden[chunk] @ weight.T": {
        "hidden states of the first chunk": "grad_logits = hidden[: chunk.stop - chunk.start] @ weight.T",
    },
    "torch.zeros_like(output_weight, dtype=grad_logps.dtype)": {
        "weight gradient summed in bf16": "torch.zeros_like(weight)",
    },
    "grad_hidden[chunk] = grad_logits @ weight": {
        "hidden gradient zero": "grad_hidden[chunk] = 0.0",
        "hidden gradient of the other sign": "grad_hidden[chunk] = -grad_logits @ weight",
    },
    "return grad_hidden, grad_weight.to(output_weight.dtype)": {
        "weight gradient not returned": "return grad_hidden, None",
        "weight gradient rounded": "return grad_hidden, grad_weight.to(hidden.dtype).to(output_weight.dtype)",
        "hidden gradient not returned": "return None, grad_weight.to(output_weight.dtype)",
    },
    "_ChunkedTokenLogps.apply(hidden, output_weight,": {
        "hidden detached": "_ChunkedTokenLogps.apply(hidden.detach(), output_weight,",
        "output matrix detached": "_ChunkedTokenLogps.apply(hidden, output_weight.detach(),",
    },
    "hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))": {"float32 under autocast": "pass"},
    "in (torch.bfloat16, torch.float16)": {"bf16 not raised": "in (torch.float16,)"},
    # endings of a packed row
    ".index_add(0, ending, values.double())": {
        "endings shifted by one": ".index_add(0, ending.roll(1), values.double())",
        "endings of the other sign": ".index_add(0, ending, values.double(), alpha=-1)",
        "endings detached": ".index_add(0, ending, values.double().detach())",
    },
    ".view(row.pairs, row.endings)": {
        "chosen and rejected swapped": ".view(row.pairs, row.endings).flip(1)",
        "endings laid out by rows of pairs": ".view(-1, row.pairs)",
        "endings laid out by side": ".view(-1, row.pairs).T",
        "pairs reversed": ".view(row.pairs, row.endings).flip(0)",
    },
    "row.queries)[row.scored]": {"hidden states shifted by one": "row.queries)[row.scored].roll(1, 0)"},
    "row.places.position": {"positions in the row, not in the text": "torch.arange(len(row.tokens))"},
}
