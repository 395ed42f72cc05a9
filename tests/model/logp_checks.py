"""What is asked of log-probs, packing and attention, as plain functions that take the code or a wrong form of
it.

test_wrong_logps.py runs them over the code, and over the mistakes of wrong_logps.py, every one of which is
refuted. A failed claim is an AssertionError. Dimensions: R rows, T tokens per row, S scored tokens, V
vocabulary, D hidden size, N tokens of a packed row.
"""

import math
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.testing import assert_close

from minidpo import logprobs
from minidpo.data import PairTokens, TokenPair
from minidpo.model import response_logps
from minidpo.model.transformer import Attend
from minidpo.packing import PackedBatch, pack
from tiny import EOS, naive_logps, naive_rewards, tiny_model, tiny_reward_model

F64 = torch.float64

# --- sequence_logps(logits, tokens, response_mask) ----------------------------------------------------------


def drawn_rows() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator, dtype=F64) * 3
    tokens = torch.randint(5, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.5
    mask[:, 0], mask[:, 2], mask[0, 1] = False, True, False
    return logits.requires_grad_(), tokens, mask


def check_rows(sequence_logps: Callable) -> None:
    """Two rows of three tokens whose next-token probabilities are written out."""
    after_first, after_second, after_last = (0.5, 0.25, 0.25), (0.1, 0.1, 0.8), (0.2, 0.2, 0.6)
    logits = torch.tensor([[after_first, after_second, after_last]] * 2, dtype=F64).log() + 3.0  # any number
    tokens = torch.tensor([[0, 1, 2], [2, 2, 0]])
    mask = torch.tensor([[False, True, True], [False, False, True]])
    sums, counts = sequence_logps(logits, tokens, mask)
    # Row 0: 1 after 0 has 0.25, 2 after that 0.8: ln 0.2. Row 1: only the last token, 0, which has 0.1.
    assert_close(sums, torch.tensor([math.log(0.2), math.log(0.1)], dtype=F64))
    assert counts.tolist() == [2, 1] and counts.dtype == torch.int64


def check_row_gradients(sequence_logps: Callable) -> None:
    """onehot - softmax at the token before each scored one, 0 elsewhere, even where a logit is -inf."""
    logits, tokens, mask = drawn_rows()
    with torch.no_grad():
        logits[0, 0, tokens[0, 1]] = -math.inf  # token 1 of row 0 cannot occur, and is not scored
    expected = torch.zeros_like(logits)
    for r, t in mask.nonzero().tolist():
        expected[r, t - 1] = torch.eye(5, dtype=F64)[tokens[r, t]] - logits[r, t - 1].detach().softmax(0)
    sums, _ = sequence_logps(logits, tokens, mask)
    assert sums.requires_grad, "log-probs are cut off from the logits"
    assert sums.isfinite().all()
    assert_close(torch.autograd.grad(sums.sum(), logits)[0], expected)


def check_half_precision_rows(sequence_logps: Callable) -> None:
    """bf16 logits: float32 from the softmax on, so equal to float32 on the same rounded numbers."""
    logits, tokens, mask = drawn_rows()
    rounded = logits.detach().bfloat16()
    sums, _ = sequence_logps(rounded, tokens, mask)
    assert sums.dtype == torch.float32
    assert torch.equal(sums, sequence_logps(rounded.float(), tokens, mask)[0])


def check_refused_rows(sequence_logps: Callable) -> None:
    """A scored first token, a row without a scored one, and shapes that do not fit are ValueErrors."""
    logits, tokens, mask = drawn_rows()
    first, empty = mask.clone(), mask.clone()
    first[1, 0], empty[1] = True, False
    wrong = [(logits, tokens, first), (logits, tokens, empty), (logits, tokens, mask[:, :-1])]
    wrong += [(logits[..., None], tokens, mask), (logits, tokens[:, :-1], mask[:, :-1])]
    for arguments in wrong:
        try:
            sequence_logps(*arguments)
        except ValueError:
            continue
        raise AssertionError(
            f"shapes {[tuple(a.shape) for a in arguments]}, mask {arguments[2]}: not refused"
        )


# --- token_logps(hidden, output_weight, targets, chunk_size) ------------------------------------------------


def drawn_hidden() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 4, generator=generator, dtype=F64, requires_grad=True)
    output_weight = torch.randn(5, 4, generator=generator, dtype=F64, requires_grad=True)
    targets = torch.randint(5, (7,), generator=generator)
    return hidden, output_weight, targets, torch.randn(7, generator=generator, dtype=F64)


def plain(hidden: Tensor, output_weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ output_weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def check_chunks(token_logps: Callable) -> None:
    """Equal to a full log-softmax with autograd, values and both gradients, for every chunk size; twice."""
    hidden, weight, targets, upstream = drawn_hidden()
    expected = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight), upstream)
    for chunk_size, cached in ((1, 2**21), (2, 2**21), (3, 1), (7, 1), (7, 2**21), (1024, 1)):
        with mock.patch.object(logprobs, "CACHED", cached):  # 1: one row of a chunk at a time in float32
            logps = token_logps(hidden, weight, targets, chunk_size)
            assert_close(logps, plain(hidden, weight, targets))
            assert logps.requires_grad, "log-probs are cut off from the model"
            for _ in range(2):
                found = torch.autograd.grad(
                    logps, (hidden, weight), upstream, retain_graph=True, materialize_grads=True
                )
                assert_close(found, expected)


def check_chunk_precision(token_logps: Callable) -> None:
    """Huge logits stay finite; bf16 products end in float32; 600 small contributions add up to 600."""
    hidden, weight, targets, _ = drawn_hidden()
    logps = token_logps(hidden.float() * 1e4, weight.float(), targets, 2)
    assert all(
        values.isfinite().all() for values in (logps, *torch.autograd.grad(logps.sum(), (hidden, weight)))
    )

    half = [values.detach().bfloat16().requires_grad_() for values in (hidden, weight)]
    logps = token_logps(*half, targets, 2)
    assert logps.dtype == torch.float32
    assert_close(logps, plain(*half, targets))
    one = half[0][:1], half[1], targets[:1]
    (single,) = torch.autograd.grad(token_logps(*one, 1).sum(), half[1])
    many = token_logps(one[0].expand(600, -1), half[1], targets[:1].expand(600), 1)
    assert_close(
        torch.autograd.grad(many.sum(), half[1])[0].float() / 600, single.float(), rtol=0.01, atol=1e-6
    )


def check_autocast(token_logps: Callable) -> None:
    """Autocast is the bf16 product, but a float32 output matrix gets its gradient unrounded."""
    hidden, weight, targets, _ = drawn_hidden()
    half = [values.detach().bfloat16().requires_grad_() for values in (hidden, weight)]
    explicit = token_logps(*half, targets, 2)
    full = [values.detach().float().requires_grad_() for values in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(*full, targets, 2)
    assert torch.equal(logps, explicit)
    found, rounded = torch.autograd.grad(logps.sum(), full), torch.autograd.grad(explicit.sum(), half)
    for ours, theirs in zip(found, rounded, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours.bfloat16(), theirs)
    assert not torch.equal(found[1], rounded[1].float())


def check_sums(sum_by_response: Callable) -> None:
    """1 alone; 2 + 4 + 8; and ten thousand float32 terms whose sum keeps its digits."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = sum_by_response(values, torch.tensor([1, 3]))
    assert sums.tolist() == [1.0, 14.0] and sums.requires_grad
    assert torch.autograd.grad(sums @ torch.tensor([1.0, -1.0]), values)[0].tolist() == [1, -1, -1, -1]
    many = sum_by_response(torch.full((10_000,), -0.1), torch.tensor([10_000]))
    assert_close(many, torch.tensor([-1000.0]), rtol=1e-7, atol=0)


# --- pack(pairs) --------------------------------------------------------------------------------------------

PAIRS = [
    TokenPair([3, 4, 5], [6, EOS], [7, 8, 9, EOS], 0),
    TokenPair([10], [11, 11, EOS], [EOS], 1),
    TokenPair([12, 3], [4, EOS], [13, 5, EOS], 2),
]


def check_packed_logps(pack: Callable) -> None:
    """Log-probs of both responses, chosen first, equal the textbook: one causal row each."""
    model = tiny_model(dtype=F64)
    batch = pack(PairTokens.from_pairs(PAIRS))
    assert_close(response_logps(model, batch), naive_logps(model, PAIRS))


def check_packed_rewards(pack: Callable) -> None:
    """A reward is read at the last token of its response, alone and in any batch."""
    model = tiny_reward_model(dtype=F64)
    rewards, _ = model.forward_packed(pack(PairTokens.from_pairs(PAIRS)))
    assert_close(rewards, naive_rewards(model, PAIRS))


# --- attention(batch) -> attend -----------------------------------------------------------------------------

# What each token (row) of two prompts sees: of the prompt p, of the chosen response c, of the rejected
# response r.
SEES = [
    "p.......",
    "pp......",
    "ppc.....",
    "ppcc....",
    "pp..r...",
    ".....p..",
    ".....pc.",
    ".....p.r",
]


def check_attention(attention: Callable[[PackedBatch], Attend]) -> None:
    """Another value of a token changes what comes out for those that see it, and for no other."""
    batch = pack(PairTokens.from_responses([[3, 4], [5]], [[[6, EOS], [EOS]], [[7], [8]]]))
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(8, heads, 16, generator=generator) for heads in (4, 2, 2))
    attend = attention(batch)
    before = attend(q, k, v, 0)
    for token in range(8):
        changed = v.clone()
        changed[token] += 1
        moved = (attend(q, k, changed, 0) - before).abs().amax((1, 2)) > 1e-4
        assert moved.tolist() == [row[token] != "." for row in SEES], f"who sees token {token}"
