"""Log-probs of responses: the definition by hand, and the form that fits in memory against the definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minidpo.data import PairTokens
from minidpo.logprobs import LOGITS, chunk_rows, sequence_logps, sum_by_response, token_logps
from minidpo.model import response_logps
from minidpo.packing import pack
from tiny import padded_rows, random_pairs, tiny_model


def test_five_tokens_by_hand():
    """Vocabulary {0, 1, 2}; the text is 0 1 2 2 0, of which the last three tokens are the response.

    The rows of `weights` are proportional to the model's next-token probabilities:
        after 0 (row 0)   1 1 1    not looked at: it predicts token 1, which is the prompt's
        after 1 (row 1)   1 2 5    token 2 follows: 5/8
        after 2 (row 2)   3 1 4    token 2 follows: 4/8
        after 2 (row 3)   1 1 2    token 0 follows: 1/4
        after 0 (row 4)   9 9 9    not looked at: nothing follows
    Sum = ln(5/8 * 4/8 * 1/4) = ln(5/64) = -2.5494, of 3 tokens; -0.8498 per token.
    With the shift forgotten it would be ln(4/8 * 2/4 * 9/27) = ln(1/12); off by one the other way, another.
    """
    weights = torch.tensor([[[1, 1, 1], [1, 2, 5], [3, 1, 4], [1, 1, 2], [9, 9, 9]]])  # (1, 5, 3)
    tokens = torch.tensor([[0, 1, 2, 2, 0]])
    response = torch.tensor([[False, False, True, True, True]])
    sums, counts = sequence_logps(weights.log(), tokens, response)
    assert counts.tolist() == [3]
    assert sums.item() == pytest.approx(math.log(5 / 64), abs=1e-6) == pytest.approx(-2.5494, abs=1e-4)


def test_sequence_logps_equals_a_loop():
    logits = torch.randn(4, 9, 7, dtype=torch.float64)
    tokens = torch.randint(0, 7, (4, 9))
    scored = torch.rand(4, 9) < 0.5
    scored[:, 0], scored[:, 5] = False, True
    sums, counts = sequence_logps(logits, tokens, scored)
    for r in range(4):
        places = [t for t in range(9) if scored[r, t]]
        expected = sum(math.log(logits[r, t - 1].softmax(0)[tokens[r, t]]) for t in places)
        assert sums[r].item() == pytest.approx(expected, abs=1e-12)
        assert counts[r].item() == len(places)


def test_prompt_logits_do_not_matter():
    logits, tokens = torch.randn(2, 8, 7), torch.randint(0, 7, (2, 8))
    scored = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0]]).bool()
    scrambled = logits.clone()
    predicts_scored = torch.cat((scored[:, 1:], torch.zeros(2, 1, dtype=torch.bool)), dim=1)
    scrambled[~predicts_scored] = torch.randn(7) * 100
    scrambled[0, 0] = -torch.inf  # even what is not a number must not leak through
    scrambled[1, 7] = torch.nan
    assert torch.equal(
        sequence_logps(logits, tokens, scored)[0], sequence_logps(scrambled, tokens, scored)[0]
    )


def test_prompt_logits_get_no_gradient():
    logits, tokens = torch.randn(1, 6, 7, requires_grad=True), torch.randint(0, 7, (1, 6))
    scored = torch.tensor([[False, False, False, True, True, False]])
    sequence_logps(logits, tokens, scored)[0].sum().backward()
    touched = logits.grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize(
    "logits, tokens, mask, named",
    [
        ((1, 4, 3), (1, 4), [[0, 0, 0, 0]], "row 0 has no scored token"),
        ((2, 4, 3), (2, 4), [[0, 0, 1, 0], [0, 0, 0, 0]], "row 1 has no scored token"),
        ((1, 4, 3), (1, 4), [[1, 0, 1, 0]], "first token"),
        ((1, 4, 3), (1, 3), [[0, 0, 1]], "must be"),
        ((4, 3), (4,), [0, 0, 1, 0], "must be"),
        ((1, 4, 3), (1, 4), [[0, 1, 1]], "must be"),
    ],
)
def test_wrong_masks_and_shapes_are_refused(logits, tokens, mask, named):
    with pytest.raises(ValueError, match=named):
        sequence_logps(torch.zeros(logits), torch.zeros(tokens, dtype=torch.int64), torch.tensor(mask).bool())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 50))
def test_token_logps_equals_log_softmax(seed, rows, chunk_size):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    ours = token_logps(hidden, weight, targets, chunk_size)
    naive = (hidden @ weight.T).log_softmax(-1)[torch.arange(rows), targets]
    torch.testing.assert_close(ours, naive, rtol=1e-12, atol=1e-12)
    for left, right in zip(
        torch.autograd.grad(ours, (hidden, weight), upstream),
        torch.autograd.grad(naive, (hidden, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


def test_token_logps_passes_gradcheck():
    hidden, weight = torch.randn(7, 4).double().requires_grad_(), torch.randn(6, 4).double().requires_grad_()
    targets = torch.tensor([0, 5, 2, 2, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, targets, 3), (hidden, weight))


def test_chunk_size_changes_nothing_but_rounding():
    hidden, weight = torch.randn(100, 16, requires_grad=True), torch.randn(61, 16, requires_grad=True)
    targets = torch.randint(0, 61, (100,))
    results = []
    for chunk_size in (1, 7, 100, 1024):
        logps = token_logps(hidden, weight, targets, chunk_size)
        results.append((logps.detach(), *torch.autograd.grad(logps.mean(), (hidden, weight))))
    for result in results[1:]:
        for left, right in zip(result, results[0], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("chunk_size", "products"), [(12, 3), (11, 3.5), (4, 3 + 2 / 3), (None, 3)])
def test_all_but_the_last_chunk_are_computed_twice(chunk_size, products):
    """Three products are the least: logits, and from their gradient those of hidden states and weight."""
    hidden, weight = torch.randn(12, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        token_logps(hidden, weight, torch.zeros(12, dtype=torch.int64), chunk_size).sum().backward()
    assert counter.get_total_flops() == products * 2 * 12 * 4 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunk_rows(dtype):
    row = 49_152 * dtype.itemsize
    rows = chunk_rows(49_152, dtype)
    assert rows * row <= LOGITS < (rows + 1) * row
    assert chunk_rows(10**12, dtype) == 1


def test_finite_where_probabilities_underflow():
    hidden, weight = torch.tensor([[1e4], [1e4]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    logps = token_logps(hidden, weight.requires_grad_(), torch.tensor([0, 1]))
    assert logps.tolist() == [0.0, -2e4]
    logps.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_token_logps_under_autocast():
    """bf16 keeps 8 bits: logits of size L carry errors up to L * 2^-8, and so does a token's log-prob.

    What must not happen is rounding of the log-probs themselves: a sum near -1000 would step by 4.
    """
    hidden, weight = torch.randn(500, 64), torch.randn(300, 64) / 4
    targets = torch.randint(0, 300, (500,))
    exact = token_logps(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        low = token_logps(hidden.requires_grad_(), weight, targets)
    assert low.dtype == torch.float32
    largest = (hidden @ weight.T).abs().max().item()
    assert (low - exact).abs().max() < 2 * largest * 2**-8  # the target's logit and the normaliser
    assert (low - exact).mean().abs() < 0.01  # and without a drift that sums would pile up
    assert not torch.equal(low, low.bfloat16().float())
    low.sum().backward()
    assert hidden.grad.dtype == torch.float32


def test_response_logps_under_autocast():
    model, rng = tiny_model(initializer_range=0.1), np.random.default_rng(0)
    row = pack(PairTokens.from_pairs(random_pairs(rng, 12, response=(1, 30))))
    exact = response_logps(model, row)
    with torch.autocast("cpu", torch.bfloat16):
        low = response_logps(model, row)
    assert low.dtype == torch.float32
    a_token = (low - exact).abs() / row.lengths
    assert a_token.max() < 0.05
    low.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_sum_by_response():
    sums = sum_by_response(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), torch.tensor([1, 3, 2]))
    assert sums.tolist() == [1.0, 14.0, 48.0]


def test_the_naive_mask_scores_responses_alone():
    (pair,) = random_pairs(np.random.default_rng(5), 1, prompt=(3, 3), response=(2, 4))
    tokens, scored = padded_rows([pair])
    assert tokens[0][scored[0]].tolist() == pair.chosen and tokens[1][scored[1]].tolist() == pair.rejected
    assert not scored[:, :3].any()
