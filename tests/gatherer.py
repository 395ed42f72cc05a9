"""What is asked of the gatherer of log-probs, as plain functions that take the module (or a broken copy).

A failed claim is an AssertionError.
Dimensions: R rows, T tokens a row, S scored tokens, V vocabulary, D hidden size.
"""

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from battery import close
from minidpo.model import ModelConfig, Transformer
from minidpo.packing import PairTokens, Wanted, pack_row
from minidpo.tokenizer import TokenPair
from refusals import value_error

F64 = torch.float64


def check_hand_computed_rows(module: ModuleType) -> None:
    """Two rows of three tokens whose next-token probabilities are written out."""
    after_first, after_second, after_last = (0.5, 0.25, 0.25), (0.1, 0.1, 0.8), (0.2, 0.2, 0.6)
    logits = (
        torch.tensor([[after_first, after_second, after_last]] * 2, dtype=F64).log() + 3.0
    )  # any constant
    tokens = torch.tensor([[0, 1, 2], [2, 2, 0]])
    mask = torch.tensor([[False, True, True], [False, False, True]])
    sums, counts = module.sequence_logps(logits, tokens, mask)
    # Row 0: 1 after 0 has 0.25, 2 after that 0.8: ln 0.2. Row 1: only the last token, 0, which has 0.1.
    close(sums, [math.log(0.2), math.log(0.1)], claim="hand-computed rows")
    assert counts.tolist() == [2, 1] and counts.dtype == torch.int64, "counts of scored tokens"


def drawn_rows() -> tuple[Tensor, Tensor, Tensor]:
    rows, length, vocabulary = 3, 6, 5
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, length, vocabulary, generator=generator, dtype=F64) * 3
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.5
    mask[:, 0], mask[:, 2] = False, True
    return logits.requires_grad_(), tokens, mask


def check_definition(module: ModuleType) -> None:
    """Sums and their gradient, one scored token after another: onehot - softmax before it, zero elsewhere."""
    logits, tokens, mask = drawn_rows()
    expected, gradient = np.zeros(len(tokens)), np.zeros(logits.shape)
    for r, t in mask.nonzero().tolist():
        probabilities = np.exp(logits[r, t - 1].detach().numpy())
        probabilities /= probabilities.sum()
        expected[r] += np.log(probabilities[tokens[r, t]])
        gradient[r, t - 1] += np.eye(len(probabilities))[tokens[r, t]] - probabilities
    sums, counts = module.sequence_logps(logits, tokens, mask)
    close(sums, expected, claim="sum over scored tokens")
    assert counts.tolist() == mask.sum(1).tolist(), "counts"
    assert sums.requires_grad, "log-probs are cut off from the logits"
    close(torch.autograd.grad(sums.sum(), logits)[0], gradient, claim="gradient of the logits")


def check_unscored_infinities(module: ModuleType) -> None:
    """A token that cannot occur does no harm where it is not scored: no NaN in value or gradient."""
    logits, tokens, mask = drawn_rows()
    mask[0, 1] = False
    banned = logits.detach().clone()
    banned[0, 0, tokens[0, 1]] = -math.inf
    banned.requires_grad_()
    sums, _ = module.sequence_logps(banned, tokens, mask)
    close(sums, module.sequence_logps(logits, tokens, mask)[0].detach(), claim="-inf outside the mask")
    assert torch.autograd.grad(sums.sum(), banned)[0].isfinite().all(), "-inf outside the mask: gradient"


def check_half_precision_rows(module: ModuleType) -> None:
    """bf16 logits: float32 from the softmax on, so equal to float32 on the same rounded numbers."""
    logits, tokens, mask = drawn_rows()
    rounded = logits.detach().bfloat16()
    sums, _ = module.sequence_logps(rounded, tokens, mask)
    assert sums.dtype == torch.float32, "float32 or better"
    assert torch.equal(sums, module.sequence_logps(rounded.float(), tokens, mask)[0]), "float32 throughout"


def check_refused_rows(module: ModuleType) -> None:
    """Shapes that do not fit, a scored first token, a row without one: refused in words."""
    logits, tokens, mask = drawn_rows()
    good = {"logits": logits, "tokens": tokens, "response_mask": mask}
    first, empty = mask.clone(), mask.clone()
    first[1, 0], empty[1] = True, False
    for wrong, says in (
        ({"logits": logits[0]}, ("logits", "(6, 5)")),
        ({"logits": logits[..., 0]}, ("logits", "(3, 6)")),
        ({"logits": logits[..., None]}, ("logits", "(3, 6, 5, 1)")),
        ({"logits": logits[:, 1:]}, ("logits", "(3, 5, 5)")),
        ({"tokens": tokens[:, 1:]}, ("tokens", "(3, 5)")),
        ({"tokens": tokens[:, 1:], "response_mask": mask[:, 1:]}, ("tokens", "(3, 5)")),
        ({"response_mask": mask[:, 1:]}, ("response_mask", "(3, 5)")),
        ({"response_mask": mask[:, [0, *range(6)]]}, ("response_mask", "(3, 7)")),
        ({"response_mask": first}, ("response_mask", "first token")),
        ({"response_mask": empty}, ("row 1", "no scored token")),
    ):
        value_error(module.sequence_logps, good | wrong, says)


def drawn_hidden(
    scored: int = 7, width: int = 4, vocabulary: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(scored, width, generator=generator, dtype=F64, requires_grad=True)
    output_weight = torch.randn(vocabulary, width, generator=generator, dtype=F64, requires_grad=True)
    targets = torch.randint(vocabulary, (scored,), generator=generator)
    return hidden, output_weight, targets, torch.randn(scored, generator=generator, dtype=F64)


def check_chunked_logps(module: ModuleType) -> None:
    """Equal to a full log-softmax with autograd, values and both gradients, whatever the chunk size."""
    hidden, weight, targets, weights = drawn_hidden()
    plain = torch.log_softmax(hidden @ weight.T, dim=-1)[torch.arange(len(targets)), targets]
    expected = torch.autograd.grad((weights * plain).sum(), (hidden, weight))
    for chunk_size, module.CACHED in (
        (1, 2**21),
        (2, 2**21),
        (3, 1),
        (7, 1),
        (7, 2**21),
        (1024, 1),
        (1024, 2**21),
    ):
        logps = module.token_logps(hidden, weight, targets, chunk_size)
        close(logps, plain.detach(), claim=f"log-probs in chunks of {chunk_size}")
        assert logps.requires_grad, "log-probs are cut off from the model"
        for again in ("", ", a second time"):
            found = torch.autograd.grad((weights * logps).sum(), (hidden, weight), retain_graph=True)
            for name, ours, theirs in zip(("hidden", "output_weight"), found, expected, strict=True):
                close(ours, theirs.numpy(), claim=f"gradient of {name} in chunks of {chunk_size}{again}")


def check_chunked_derivatives(module: ModuleType) -> None:
    hidden, weight, targets, _ = drawn_hidden(scored=3, width=2, vocabulary=3)
    of_inputs = lambda h, w: module.token_logps(h, w, targets, 2)  # noqa: E731
    assert torch.autograd.gradcheck(of_inputs, (hidden, weight), raise_exception=False), "gradcheck"


def check_chunked_precision(module: ModuleType) -> None:
    """Huge logits stay finite; bf16 products end in float32; 600 small contributions add up to 600."""
    hidden, weight, targets, _ = drawn_hidden()
    logps = module.token_logps(hidden.float() * 1e4, weight.float(), targets, 2)
    gradients = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert all(values.isfinite().all() for values in (logps, *gradients)), "huge logits"

    half = [values.detach().bfloat16().requires_grad_() for values in (hidden, weight)]
    logps = module.token_logps(*half, targets, 2)
    assert logps.dtype == torch.float32, "float32 from the logits on"
    close(
        logps,
        torch.log_softmax((half[0] @ half[1].T).float(), -1).gather(1, targets[:, None])[:, 0].detach(),
        1e-6,
    )
    explicit = torch.autograd.grad(logps.sum(), half)
    with torch.autocast("cpu", torch.bfloat16):
        full = [values.detach().float().requires_grad_() for values in (hidden, weight)]
        in_autocast = module.token_logps(*full, targets, 2)
    assert torch.equal(in_autocast, logps), "autocast is the bf16 product"
    found = torch.autograd.grad(in_autocast.sum(), full)
    for ours, theirs in zip(found, explicit, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours.bfloat16(), theirs), "gradient under autocast"
    assert not torch.equal(found[1], explicit[1].float()), (
        "a float32 output matrix gets its gradient unrounded"
    )

    one = (half[0][:1], half[1], targets[:1])
    single = torch.autograd.grad(module.token_logps(*one, 1).sum(), half[1])[0]
    many = module.token_logps(one[0].expand(600, -1), half[1], targets[:1].expand(600), 1)
    close(
        torch.autograd.grad(many.sum(), half[1])[0] / 600,
        single.double().numpy(),
        rtol=0.01,
        claim="many chunks",
    )


def check_sums_by_ending(module: ModuleType) -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = module.sum_by_ending(values, torch.tensor([1, 3]))
    assert sums.tolist() == [1.0, 14.0], "1 alone; 2 + 4 + 8"
    assert sums.requires_grad, "sums are cut off from the log-probs"
    assert torch.autograd.grad(sums @ torch.tensor([1.0, -1.0]), values)[0].tolist() == [1, -1, -1, -1]


def check_packed_row(module: ModuleType) -> None:
    """Both endings of packed pairs, chosen first, equal the textbook: one causal row each."""
    torch.manual_seed(2)
    config = ModelConfig(11, 8, 16, 2, 2, 1, 4, initializer_range=0.5)
    model = Transformer(config).double()
    pairs = [
        TokenPair([1, 2, 3], [4, 5], [6, 7, 8, 9], 0),
        TokenPair([5], [6, 6, 1], [2], 1),
        TokenPair([9, 1], [3], [10, 4], 2),
    ]
    row = pack_row(PairTokens.from_pairs(pairs), Wanted(chosen_logps=True, rejected_logps=True))
    found = module.response_logps(model, row)
    for b, pair in enumerate(pairs):
        for which, ending in enumerate((pair.chosen, pair.rejected)):
            logps = torch.log_softmax(model(torch.tensor([pair.prompt + ending])), dim=-1)[0]  # (T, V)
            start = len(pair.prompt) - 1
            expected = sum(logps[start + i, token] for i, token in enumerate(ending))
            close(found[b, which], expected.item(), rtol=1e-10, claim=f"pair {b}, ending {which}")


GATHERER_CHECKS = (
    check_hand_computed_rows,
    check_definition,
    check_unscored_infinities,
    check_half_precision_rows,
    check_refused_rows,
    check_chunked_logps,
    check_chunked_precision,
    check_chunked_derivatives,
    check_sums_by_ending,
    check_packed_row,
)
