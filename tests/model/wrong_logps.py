"""Mistakes that real projects made in log-probs, packing and attention, by the check that refutes them.

Each has the arguments of what it stands for: sequence_logps(logits, tokens, mask),
token_logps(hidden, weight, targets, chunk_size), sum_by_response(values, lengths), pack(pairs) and
attention(batch).
"""

from dataclasses import replace

import logp_checks as checks
import numpy as np
import torch
import torch.nn.functional as F

from minidpo.data import PairTokens
from minidpo.logprobs import sequence_logps, sum_by_response, token_logps
from minidpo.packing import pack


def gathered(logps, tokens):
    return logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def rows(of_tokens=None, of_mask=None, total=None, counts=None):
    """sequence_logps in four steps, of which one is wrong: log-probs of tokens, mask, total, counts."""
    right_logps = lambda logits, tokens: gathered(logits[:, :-1].log_softmax(-1), tokens[:, 1:])  # noqa: E731
    right_total = lambda logps, scored: torch.where(scored, logps, 0.0).sum(1)  # noqa: E731

    def form(logits, tokens, mask):
        logps = (of_tokens or right_logps)(logits, tokens)
        scored = (of_mask or (lambda mask: mask[:, 1:]))(mask)
        return (total or right_total)(logps, scored), (counts or (lambda scored: scored.sum(1)))(scored)

    return form


class WithGradient(torch.autograd.Function):
    """Log-probs whose gradient in the logits is gradient(onehot (S, V), softmax (S, V), upstream (S, 1))."""

    @staticmethod
    def forward(ctx, logits, targets, gradient):
        ctx.onehot, ctx.softmax = F.one_hot(targets, logits.shape[1]).to(logits.dtype), logits.softmax(-1)
        ctx.gradient = gradient
        return gathered(logits.log_softmax(-1), targets)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.gradient(ctx.onehot, ctx.softmax, upstream[:, None]), None, None


def backward(gradient):
    return lambda hidden, weight, targets, chunk: WithGradient.apply(hidden @ weight.T, targets, gradient)


def forward(of_logits):
    return lambda hidden, weight, targets, chunk: of_logits(hidden @ weight.T, targets)


def overwritten(onehot, softmax, upstream):
    gradient = (onehot - softmax) * upstream
    softmax.zero_()
    return gradient


def backwards(values):
    """The same values with a gradient of the other sign."""
    return 2 * values.detach() - values


def weight_only_in_the_last_chunk(hidden, weight, targets, chunk):
    first = token_logps(hidden[:-chunk], weight.detach(), targets[:-chunk], chunk)
    return torch.cat((first, token_logps(hidden[-chunk:], weight, targets[-chunk:], chunk)))


def without_autocast(hidden, weight, targets, chunk):
    with torch.autocast("cpu", enabled=False):
        return token_logps(hidden, weight, targets, chunk)


def repacked(change):
    """pack(pairs) with the fields that change(batch) gives."""

    def form(pairs):
        batch = pack(pairs)
        return replace(batch, **change(batch))

    return form


def other_pairs(change):
    """pack() of other pairs, from the ids of the prompt and of both responses."""

    def form(pairs):
        texts = [np.split(pairs.ids[b[0] : b[-1]], b[1:-1] - b[0]) for b in pairs.bounds]
        changed = [change(*(part.tolist() for part in text)) for text in texts]
        return pack(PairTokens.from_responses([p for p, _, _ in changed], [[c, r] for _, c, r in changed]))

    return form


def leaving_out(i):
    """Without the first (0) or the last (-1) scored token of the row."""

    def change(batch):
        kept = torch.arange(len(batch.targets)) != i % len(batch.targets)
        lengths = batch.lengths.clone()
        lengths.view(-1)[i] -= 1
        return {"targets": batch.targets[kept], "predicts": batch.predicts[kept], "lengths": lengths}

    return change


def attention(rule):
    """Attention by a mask (N, N) that rule(same, later, prompt, own) makes of four others, queries in rows.

    Whether the key is of the same prompt, later in its text, in a prompt, in a response of the same number.
    """

    def of_batch(batch):
        same, own = batch.prompt[:, None] == batch.prompt, batch.response[:, None] == batch.response
        later = batch.position > batch.position[:, None]
        may = rule(same, later, (batch.response == 0).expand_as(same), own)

        def attend(q, k, v, layer):
            q, k, v = (heads.transpose(0, 1) for heads in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=may, enable_gqa=True).transpose(0, 1)

        return attend

    return of_batch


WRONG = {
    checks.check_rows: {
        "logits not shifted": rows(lambda x, t: gathered(x[:, 1:].log_softmax(-1), t[:, 1:])),
        "tokens not shifted": rows(lambda x, t: gathered(x[:, :-1].log_softmax(-1), t[:, :-1])),
        "next token but one": rows(lambda x, t: gathered(x[:, :-1].log_softmax(-1), t[:, 1:].roll(-1, 1))),
        "softmax over positions": rows(lambda x, t: gathered(x[:, :-1].log_softmax(1), t[:, 1:])),
        "no softmax": rows(lambda x, t: gathered(x[:, :-1], t[:, 1:])),
        "softmax without its log": rows(lambda x, t: gathered(x[:, :-1].softmax(-1), t[:, 1:])),
        "mask not shifted": rows(of_mask=lambda mask: mask[:, :-1]),
        "mask off by one": rows(of_mask=lambda mask: mask[:, 1:].roll(-1, 1)),
        "first token of a response not scored": rows(of_mask=lambda mask: mask[:, 1:] & mask[:, :-1]),
        "prompt in the sum": rows(total=lambda logps, scored: logps.sum(1)),
        "prompt scored instead": rows(total=lambda logps, scored: (logps * ~scored).sum(1)),
        "mean over the padded length": rows(total=lambda logps, scored: (logps * scored).mean(1)),
        "mean for sum": rows(total=lambda logps, scored: (logps * scored).sum(1) / scored.sum(1)),
        "sum of probabilities": rows(total=lambda logps, scored: (logps.exp() * scored).sum(1)),
        "counts of the whole row": rows(counts=lambda scored: torch.full((len(scored),), scored.shape[1])),
        "counts one too many": rows(counts=lambda scored: scored.sum(1) + 1),
        "counts in floating point": rows(counts=lambda scored: scored.sum(1).float()),
    },
    checks.check_row_gradients: {
        "logits detached": lambda logits, tokens, mask: sequence_logps(logits.detach(), tokens, mask),
        "mask by multiplication": rows(total=lambda logps, scored: (logps * scored).sum(1)),
    },
    checks.check_half_precision_rows: {
        "log-softmax in bf16": rows(lambda x, t: gathered(x[:, :-1].log_softmax(-1), t[:, 1:]).float()),
        "sum in bf16": rows(),
    },
    checks.check_refused_rows: {
        "nothing refused": rows(of_mask=lambda mask: mask[:, -5:]),
    },
    checks.check_chunks: {
        # What becomes of the logits.
        "normaliser added": forward(lambda x, t: gathered(x, t) + x.logsumexp(-1)),
        "normaliser dropped": forward(gathered),
        "one normaliser for all rows": forward(lambda x, t: gathered(x, t) - x.logsumexp(-1).mean()),
        "logits halved": forward(lambda x, t: gathered((x / 2).log_softmax(-1), t)),
        "targets shifted by one": lambda h, w, t, c: token_logps(h, w, t.roll(1), c),
        "hidden states shifted by one": lambda h, w, t, c: token_logps(h.roll(1, 0), w, t, c),
        "first chunk only": lambda h, w, t, c: token_logps(h[:c], w, t[:c], c),
        "rows of the first chunk for all": lambda h, w, t, c: token_logps(h[torch.arange(7) % c], w, t, c),
        # The gradient of the logits: onehot o, softmax p, incoming gradient g.
        "softmax's sign": backward(lambda o, p, g: (o + p) * g),
        "softmax dropped": backward(lambda o, p, g: o * g),
        "softmax not normalised": backward(lambda o, p, g: (o - 3 * p) * g),
        "softmax of another row": backward(lambda o, p, g: (o - p.roll(1, 0)) * g),
        "log-softmax for softmax": backward(lambda o, p, g: (o - p.log()) * g),
        "softmax without the incoming gradient": backward(lambda o, p, g: o * g - p),
        "softmax with another row's gradient": backward(lambda o, p, g: o * g - p * g.roll(1, 0)),
        "softmax with the gradient squared": backward(lambda o, p, g: o * g - p * g**2),
        "one-hot of the other sign": backward(lambda o, p, g: (-o - p) * g),
        "one-hot twice": backward(lambda o, p, g: (2 * o - p) * g),
        "one-hot dropped": backward(lambda o, p, g: -p * g),
        "one-hot of another row": backward(lambda o, p, g: (o.roll(1, 0) - p) * g),
        "one-hot without the incoming gradient": backward(lambda o, p, g: o - p * g),
        "one-hot with the mean gradient": backward(lambda o, p, g: o * g.mean() - p * g),
        "logits overwritten by the first backward": backward(overwritten),
        # The gradients of hidden states and output matrix.
        "hidden states detached": lambda h, w, t, c: token_logps(h.detach(), w, t, c),
        "output matrix detached": lambda h, w, t, c: token_logps(h, w.detach(), t, c),
        "hidden gradient of the other sign": lambda h, w, t, c: token_logps(backwards(h), w, t, c),
        "weight gradient of the other sign": lambda h, w, t, c: token_logps(h, backwards(w), t, c),
        "weight gradient of the last chunk alone": weight_only_in_the_last_chunk,
    },
    checks.check_chunk_precision: {
        "normaliser that overflows": forward(lambda x, t: gathered(x, t) - x.exp().sum(-1).log()),
        "softmax in bf16": forward(lambda x, t: gathered(x.log_softmax(-1), t)),
        "weight gradient added up in bf16": lambda h, w, t, c: torch.cat(
            [token_logps(h[i : i + c], w, t[i : i + c], c) for i in range(0, len(h), c)]
        ),
    },
    checks.check_autocast: {
        "float32 under autocast": without_autocast,
        "weight gradient rounded": lambda h, w, t, c: token_logps(h, w.bfloat16(), t, c),
    },
    checks.check_sums: {
        "responses shifted by one": lambda values, lengths: sum_by_response(values.roll(1), lengths),
        "other sign": lambda values, lengths: -sum_by_response(values, lengths),
        "detached": lambda values, lengths: sum_by_response(values.detach(), lengths),
        "mean for sum": lambda values, lengths: sum_by_response(values, lengths) / lengths,
        "added up in float32": lambda values, lengths: torch.zeros(len(lengths)).index_add(
            0, torch.repeat_interleave(lengths), values
        ),
    },
    checks.check_packed_logps: {
        "positions not restarting": repacked(lambda b: {"position": torch.arange(len(b.tokens))}),
        "second response after the first": repacked(
            lambda b: {"position": torch.cat([torch.arange(int(row[-1] - row[0])) for row in b.bounds])}
        ),
        "positions one later": repacked(lambda b: {"position": b.position + (b.response > 0)}),
        "predicts off by one": repacked(lambda b: {"predicts": b.predicts + 1}),
        "predicts off by one the other way": repacked(lambda b: {"predicts": (b.predicts - 1).clamp(0)}),
        "rejected response predicted by the end of the chosen one": repacked(
            lambda b: {"predicts": (b.response > 0).nonzero().squeeze(1) - 1}
        ),
        "first token of a response not scored": repacked(leaving_out(0)),
        "last token of a response not scored": repacked(leaving_out(-1)),
        "responses swapped": other_pairs(lambda p, c, r: (p, r, c)),
        "EOS dropped": other_pairs(lambda p, c, r: (p, c[:-1], r[:-1] or r)),
        "EOS twice": other_pairs(lambda p, c, r: (p, [*c, checks.EOS], [*r, checks.EOS])),
        "last token of the prompt in the response": other_pairs(
            lambda p, c, r: (p[:-1], p[-1:] + c, p[-1:] + r) if len(p) > 1 else (p, c, r)
        ),
        "rejected response after the chosen prompt's length": other_pairs(lambda p, c, r: (p, c, r[1:] or r)),
        "pairs reversed": lambda pairs: pack(pairs, np.arange(len(pairs))[::-1]),
        "laid out by side": repacked(lambda b: {"lengths": b.lengths.T.reshape(b.lengths.shape)}),
    },
    checks.check_packed_rewards: {
        "read at the prompt's end": repacked(lambda b: {"last": torch.tensor(b.bounds[:, 1:-1] - 1)}),
        "read one token early": repacked(lambda b: {"last": b.last - 1}),
        "both read at the end of the row": repacked(lambda b: {"last": b.last[:, 1:].expand_as(b.last)}),
        "responses swapped": repacked(lambda b: {"last": b.last.flip(1)}),
    },
    checks.check_attention: {
        "a response sees the other one": attention(lambda same, later, prompt, own: same & ~later),
        "a prompt sees its responses": attention(lambda same, later, prompt, own: same & (~later | ~prompt)),
        "a response does not see its prompt": attention(lambda same, later, prompt, own: same & ~later & own),
        "not causal": attention(lambda same, later, prompt, own: same & (prompt | own)),
        "another prompt is seen": attention(lambda same, later, prompt, own: ~later & (prompt | own)),
        "no mask": attention(lambda same, later, prompt, own: torch.ones_like(same)),
        "a token sees itself alone": attention(lambda same, later, prompt, own: torch.eye(len(same)).bool()),
    },
}
