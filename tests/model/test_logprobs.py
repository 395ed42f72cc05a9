"""Log-probs of responses: the definition by hand, then the chunked form against a full log-softmax.

A test that takes `form` is run on the code here, and on wrong forms of it by test_wrong_logps.py.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from minidpo import logprobs
from minidpo.logprobs import sequence_logps, sum_by_response, token_logps, tokens_per_chunk

F64 = torch.float64

# --- sequence_logps(logits, tokens, response_mask): the definition ------------------------------------------


def test_five_tokens(form=sequence_logps):
    """Vocabulary {0, 1, 2}; the text is 0 1 2 2 0. Row 0 scores its last three tokens, row 1 the last one.

    `weights` are proportional to the model's next-token probabilities:
        after 0   1 1 2    not looked at: it predicts token 1, which is the prompt's
        after 1   1 2 5    token 2 follows: 5/8
        after 2   3 1 4    token 2 follows: 4/8
        after 2   1 1 2    token 0 follows: 1/4
        after 0   9 9 2    not looked at: nothing follows
    Row 0: ln(5/8 * 4/8 * 1/4) = ln(5/64) = -2.5494 of 3 tokens. Row 1: ln(1/4) of 1 token.
    """
    weights = torch.tensor([[1, 1, 2], [1, 2, 5], [3, 1, 4], [1, 1, 2], [9, 9, 2]])
    logits = weights.log().expand(2, 5, 3)
    tokens = torch.tensor([[0, 1, 2, 2, 0]] * 2)
    response = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    sums, counts = form(logits, tokens, response)
    assert_close(sums, torch.tensor([math.log(5 / 64), math.log(1 / 4)]))
    assert counts.tolist() == [3, 1] and counts.dtype == torch.int64


def test_definition(form=sequence_logps):
    """A loop over scored tokens gives the sums; the gradient is onehot - softmax before each, 0 elsewhere.

    Token 1 of row 0 is not scored, so it does no harm that its log-prob is -inf.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator, dtype=F64)
    tokens = torch.randint(5, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]]).bool()
    logits[0, 0, tokens[0, 1]] = -math.inf
    logits.requires_grad_()
    sums, _ = form(logits, tokens, mask)
    gradient = torch.zeros_like(logits)
    for r in range(3):
        logp = 0.0
        for t in (t for t in range(6) if mask[r, t]):
            softmax = logits[r, t - 1].detach().softmax(0)
            logp += math.log(softmax[tokens[r, t]])
            gradient[r, t - 1] = -softmax
            gradient[r, t - 1, tokens[r, t]] += 1
        assert sums[r].item() == pytest.approx(logp, rel=1e-12)
    assert sums.requires_grad
    assert_close(torch.autograd.grad(sums.sum(), logits)[0], gradient)


def test_bf16_rows():
    """bf16 logits are cast to float32 before the softmax: they give the same sums as float32 logits."""
    logits = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, mask = torch.ones(2, 6, dtype=torch.int64), torch.arange(6).expand(2, 6) > 2
    sums, of_float32 = (sequence_logps(x, tokens, mask)[0] for x in (logits, logits.float()))
    assert torch.equal(sums, of_float32)


@pytest.mark.parametrize(
    ("logits", "mask", "said"),
    [
        ((2, 4, 3), [[0, 0, 1, 0], [0, 0, 0, 0]], "row 1 has no scored token"),
        ((1, 4, 3), [[1, 0, 1, 0]], "first token"),
        ((1, 4, 3), [[0, 1, 1]], "must be"),
        ((4, 3), [0, 0, 1, 0], "must be"),
    ],
)
def test_refused(logits, mask, said):
    """Nothing scored, a first token scored, and shapes that do not fit."""
    tokens = torch.zeros(logits[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match=said):
        sequence_logps(torch.zeros(logits), tokens, torch.tensor(mask).bool())


# --- token_logps(hidden, output_weight, targets, chunk_size): the chunked form ------------------------------


def seven_tokens(dtype=F64) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (7, 4), output_weight (5, 4), targets (7,)."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 4, generator=generator), torch.randn(5, 4, generator=generator)
    targets = torch.tensor([0, 4, 2, 2, 2, 1, 0])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(-1)[torch.arange(len(targets)), targets]


def gradients(logps: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a sum in which the first token counts 1, the second 2, ...: every token has a different gradient."""
    weighted = (logps * torch.arange(1, len(logps) + 1)).sum()
    return torch.autograd.grad(weighted, inputs, retain_graph=True, materialize_grads=True, allow_unused=True)


def test_chunks(form=token_logps):
    """Chunks of any size give the values and gradients of the full log-softmax, in a second backward too."""
    hidden, weight, targets = seven_tokens()
    expected = full(hidden, weight, targets)
    for chunk_size in (1, 2, 3, 7, 1024):
        logps = form(hidden, weight, targets, chunk_size)
        assert_close(logps, expected, rtol=1e-12, atol=1e-12)
        assert logps.requires_grad
        for _ in range(2):
            assert_close(gradients(logps, hidden, weight), gradients(expected, hidden, weight))


def test_one_row_at_a_time(monkeypatch):
    """A CPU works on a few rows of a chunk at once in float32; one row at a time gives the same."""
    monkeypatch.setattr(logprobs, "FLOAT32_LOGITS", {"cpu": 1})
    test_chunks()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_on_gpu(dtype):
    """What a GPU compiles, a comparison in place of a scatter, replaces logits by the same gradients."""
    logits = torch.randn(5, 7, dtype=dtype)
    grads = torch.randn(5, 1, dtype=torch.promote_types(dtype, torch.float32))
    normalizers = logits.to(grads.dtype).logsumexp(1, keepdim=True)
    targets = torch.tensor([[0], [6], [3], [3], [1]])
    on_gpu = logits.clone()
    logprobs._to_gradient(logits, normalizers, targets, grads)
    logprobs._to_gradient_on_gpu(on_gpu, normalizers, targets, grads)
    assert_close(on_gpu, logits, rtol=1e-6 if dtype == torch.float64 else 0.01, atol=1e-6)


def test_huge_logits():
    """Logits 1e4 and -1e4: log-probs 0 and -2e4, and finite gradients, though e^-20000 is 0."""
    hidden, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0]])
    logps = token_logps(hidden, weight.requires_grad_(), torch.tensor([0, 1]), 1)
    assert logps.tolist() == [0.0, -2e4]
    assert all(gradient.isfinite().all() for gradient in gradients(logps, hidden, weight))


def test_bf16_chunks():
    """bf16 products, then float32: log-probs are not rounded, and 600 gradients add up to 600 times one."""
    hidden, weight, targets = seven_tokens(torch.bfloat16)
    assert_close(token_logps(hidden, weight, targets, 2), full(hidden, weight, targets))
    one, many = (
        token_logps(hidden[:1].expand(n, -1), weight, targets[:1].expand(n), 1).sum() for n in (1, 600)
    )
    one, many = (torch.autograd.grad(logp, weight)[0].float() for logp in (one, many))
    assert_close(many / 600, one, rtol=0.01, atol=1e-6)


def test_autocast():
    """Autocast gives what bf16 inputs give, but a float32 weight's gradient comes unrounded."""
    hidden, weight, targets = seven_tokens(torch.bfloat16)
    full_hidden, full_weight = (values.detach().float().requires_grad_() for values in (hidden, weight))
    expected = token_logps(hidden, weight, targets, 2)
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(full_hidden, full_weight, targets, 2)
    assert torch.equal(logps, expected)
    of_hidden, of_weight = gradients(logps, full_hidden, full_weight)
    assert_close((of_hidden.bfloat16(), of_weight.bfloat16()), gradients(expected, hidden, weight))
    assert not torch.equal(of_weight, of_weight.bfloat16().float())


@pytest.mark.parametrize(("chunk_size", "products"), [(12, 3), (11, 3.5), (4, 3 + 2 / 3), (None, 3)])
def test_products(chunk_size, products):
    """Three matrix products (logits, gradients of hidden and of weight), plus the logits again for every
    chunk but the last. 12 rows in chunks of at most 11 are two chunks of 6: half of the logits again."""
    hidden, weight = torch.randn(12, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        token_logps(hidden, weight, torch.zeros(12, dtype=torch.int64), chunk_size).sum().backward()
    assert counter.get_total_flops() == products * 2 * 12 * 4 * 5
    assert tokens_per_chunk(10**12, torch.float32) == 1
    assert tokens_per_chunk(2**20, torch.bfloat16) == 2**28 // 2**21  # 256 MiB of logits of 2 bytes


# --- sum_by_response(values, lengths) -----------------------------------------------------------------------


def test_sum_by_response():
    """Responses of 1, 3 and 2 tokens: 1; 2 + 4 + 8; 16 + 32. The gradient of each token is its response's."""
    values = torch.tensor([1.0, 2, 4, 8, 16, 32], requires_grad=True)
    sums = sum_by_response(values, torch.tensor([1, 3, 2]))
    assert sums.tolist() == [1, 14, 48] and sums.requires_grad
    (gradient,) = torch.autograd.grad(sums @ torch.tensor([5.0, 6, 7]), values)
    assert gradient.tolist() == [5, 6, 6, 6, 7, 7]
    # 2^24 + 1 is no float32: each of 64 ones would be lost on its way into a float32 sum.
    sums = sum_by_response(torch.tensor([-(2.0**24)] + [-1.0] * 64 + [-3.0]), torch.tensor([65, 1]))
    assert sums.tolist() == [-(2.0**24) - 64, -3.0] and sums.dtype == torch.float32
