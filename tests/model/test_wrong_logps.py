"""Mistakes that real projects made in log-probs, packing and attention, each refuted by a test.

x are logits (R, T, V), t tokens (R, T), m a response mask (R, T); h hidden states (S, D), w an output matrix
(V, D), t targets (S,), c a chunk size; b is a packed batch.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import test_attention
import test_logprobs
import test_packing
import test_reward_model
import torch
from test_packing import packed
from torch import Tensor

from minidpo.logprobs import sequence_logps, token_logps


def pick(logps: Tensor, tokens: Tensor) -> Tensor:
    return logps.gather(-1, tokens[..., None])[..., 0]


def total(logps: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(scored, logps, 0.0).sum(1), scored.sum(1)


def right(x: Tensor, t: Tensor) -> Tensor:
    """(R, T-1): the log-prob of every token but the first."""
    return pick(x[:, :-1].log_softmax(-1), t[:, 1:])


def changed(**fields: Callable) -> Callable:
    """packed(pairs) with the fields that functions of the right batch give."""
    return lambda pairs, **n: replace(b := packed(pairs, **n), **{k: field(b) for k, field in fields.items()})


def masked(rule: Callable) -> Callable:
    """Attention by the mask that rule(same_prompt, later, in_prompt, own) makes of four masks (N, N)."""

    def attention(b):
        prompt, response = test_attention.parts(b)
        same, own = prompt[:, None] == prompt, response[:, None] == response
        later, in_prompt = b.position > b.position[:, None], (response == 0).expand_as(same)
        may = rule(same, later, in_prompt, own)
        return lambda q, k, v, layer: test_attention.plain_attention(q, k, v, may)

    return attention


WRONG = {
    test_logprobs.test_five_tokens: {  # of sequence_logps(x, t, m)
        "logits not shifted": lambda x, t, m: total(pick(x.log_softmax(-1), t), m),
        "mask not shifted": lambda x, t, m: total(right(x, t), m[:, :-1]),
        "first token of a response not scored": lambda x, t, m: total(right(x, t), m[:, 1:] & m[:, :-1]),
        "prompt in the sum": lambda x, t, m: (right(x, t).sum(1), m.sum(1)),
        "mean over the padded length": lambda x, t, m: ((right(x, t) * m[:, 1:]).mean(1), m.sum(1)),
        "mean for sum": lambda x, t, m: ((right(x, t) * m[:, 1:]).sum(1) / m.sum(1), m.sum(1)),
    },
    test_logprobs.test_definition: {
        "logits detached": lambda x, t, m: sequence_logps(x.detach(), t, m),
        "mask by multiplication": lambda x, t, m: ((right(x, t) * m[:, 1:]).sum(1), m.sum(1)),
    },
    test_logprobs.test_chunks: {  # of token_logps(h, w, t, c)
        "normaliser dropped": lambda h, w, t, c: pick(h @ w.T, t),
        "hidden states shifted": lambda h, w, t, c: token_logps(h.roll(1, 0), w, t, c),
        "hidden states detached": lambda h, w, t, c: token_logps(h.detach(), w, t, c),
        "output matrix detached": lambda h, w, t, c: token_logps(h, w.detach(), t, c),
    },
    test_packing.test_three_pairs: {
        "positions not restarting": changed(position=lambda b: torch.arange(len(b.tokens))),
        "second response after the first": changed(
            position=lambda b: torch.cat([torch.arange(int(row[-1] - row[0])) for row in b.bounds])
        ),
        "positions one later": changed(position=lambda b: b.position + (test_attention.parts(b)[1] > 0)),
        "predicted by itself": changed(predictor=lambda b: b.predictor + 1),
        "rejected predicted by the end of chosen": changed(
            predictor=lambda b: test_attention.parts(b)[1].nonzero()[:, 0] - 1
        ),
        "responses swapped": lambda pairs: packed([p._replace(chosen=p[2], rejected=p[1]) for p in pairs]),
        "pairs reversed": lambda pairs: packed(pairs[::-1]),
    },
    test_reward_model.test_rewards: {
        "read at the prompt's end": changed(last=lambda b: torch.tensor(b.bounds[:, 1:-1] - 1)),
        "read one token early": changed(last=lambda b: b.last - 1),
        "responses swapped": changed(last=lambda b: b.last.flip(1)),
    },
    test_attention.test_who_sees_whom: {
        "a response sees the other one": masked(lambda same, later, prompt, own: same & ~later),
        "a prompt sees its responses": masked(lambda same, later, prompt, own: same & (~later | ~prompt)),
        "a response does not see its prompt": masked(lambda same, later, prompt, own: same & ~later & own),
        "not causal": masked(lambda same, later, prompt, own: same & (prompt | own)),
        "another prompt is seen": masked(lambda same, later, prompt, own: ~later & (prompt | own)),
    },
}


@pytest.mark.parametrize(
    ("test", "form"),
    [
        pytest.param(test, form, id=f"{test.__name__}: {mistake}")
        for test, forms in WRONG.items()
        for mistake, form in forms.items()
    ],
)
def test_refuted(test, form):
    """The test that the code passes fails for a wrong form of it."""
    with pytest.raises(AssertionError):
        test(form)
