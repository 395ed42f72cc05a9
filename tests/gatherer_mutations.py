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
    ".squeeze(-1) - normalizer)": {
        "normaliser added": ".squeeze(-1) + normalizer)",
        "normaliser dropped": ".squeeze(-1))",
    },
    "normalizer = logits.logsumexp(dim=-1)": {
        "one normaliser for the chunk": "normalizer = logits.logsumexp(dim=-1).mean().expand(len(h))",
        "overflowing normaliser": "normalizer = logits.exp().sum(dim=-1).log()",
    },
    "targets.split(chunk_size), strict=True": {
        "targets shifted by one": "targets.roll(1).split(chunk_size), strict=True",
        "first chunk only": "targets.split(chunk_size)[:1]",
    },
    "logits = at_least_float32(h @ output_weight.T)  #": {
        "logits left in bf16": "logits = h @ output_weight.T  #",
        "logits halved": "logits = 0.5 * at_least_float32(h @ output_weight.T)  #",
    },
    # the chunked form: backward
    "logits.sub_(normalizers[rows, None]).exp_().neg_()": {
        "softmax's sign": "logits.sub_(normalizers[rows, None]).exp_()",
        "softmax not normalised": "logits.exp_().neg_()",
        "softmax normalised by another row": "logits.sub_(normalizers.roll(1)[rows, None]).exp_().neg_()",
        "softmax dropped": "logits.mul_(0)",
        "log-softmax for softmax": "logits.sub_(normalizers[rows, None]).neg_()",
    },
    "torch.ones_like(normalizers[rows, None])": {
        "one-hot of the other sign": "-torch.ones_like(normalizers[rows, None])",
        "one-hot twice": "2 * torch.ones_like(normalizers[rows, None])",
        "one-hot dropped": "torch.zeros_like(normalizers[rows, None])",
    },
    "1, targets[rows, None]": {"one-hot of another row": "1, targets.roll(1)[rows, None]"},
    "grad_logits.mul_(grad_logps[rows, None])": {
        "incoming gradient ignored": "grad_logits",
        "incoming gradient of another row": "grad_logits.mul_(grad_logps.roll(1)[rows, None])",
        "incoming gradient averaged": "grad_logits.mul_(grad_logps.mean())",
        "incoming gradient twice": "grad_logits.mul_(grad_logps[rows, None] ** 2)",
    },
    "grad_weight += grad_logits.T @ h": {
        "weight gradient of the last chunk alone": "grad_weight = grad_logits.T @ h",
        "weight gradient of the other sign": "grad_weight -= grad_logits.T @ h",
    },
    "h = hidden[rows]\n": {"hidden states of the first chunk": "h = hidden[: rows.stop - rows.start]\n"},
    "torch.zeros_like(output_weight, dtype=normalizers.dtype)": {
        "weight gradient summed in bf16": "torch.zeros_like(output_weight)",
    },
    "grad_hidden[rows] = grad_logits @ output_weight": {
        "hidden gradient zero": "grad_hidden[rows] = 0.0",
        "hidden gradient of the other sign": "grad_hidden[rows] = -grad_logits @ output_weight",
    },
    "return grad_hidden, grad_weight.to(output_weight.dtype)": {
        "weight gradient not returned": "return grad_hidden, None",
        "hidden gradient not returned": "return None, grad_weight.to(output_weight.dtype)",
    },
    "_ChunkedTokenLogps.apply(hidden, output_weight,": {
        "hidden detached": "_ChunkedTokenLogps.apply(hidden.detach(), output_weight,",
        "output matrix detached": "_ChunkedTokenLogps.apply(hidden, output_weight.detach(),",
    },
    "hidden, output_weight = hidden.to(dtype), output_weight.to(dtype)": {"float32 under autocast": "pass"},
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
