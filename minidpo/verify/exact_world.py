"""A language small enough to list, in which the policy that each loss must converge to is known.

Glossary:
    x, y, |y|     a prompt, a response, its length in scored tokens
    r*(x, y)      the true reward; p*(y beats y') = sigma(r*(x, y) - r*(x, y'))        Bradley & Terry 1952
    mu(y|x)       the sampler: a pair's responses are two independent draws from it, its label one from p*
    pi_ref        the reference: a random transformer
    g(y)          log( pi(y|x) / pi_ref(y|x) )
Dimensions: X prompts, Y responses per prompt. A table is (X, Y), float64.

The words are 1, 2, ..., and EOS is 0. A response is up to T-1 words and EOS, or T words and no EOS, because a
text that was cut is scored without one. These are the leaves of the tree that sampling T tokens walks down,
so their probabilities sum to one exactly, for any transformer whose vocabulary is EOS and the words.

claims/ says which optimum a loss has, exact_train.py trains. With one number c per prompt, fixed by the
probabilities summing to one, most optima have the form

    log pi(y|x) = base(y) + n(y) (s(y) / beta + c)                                                  (1)

with log pi_ref or 0 for the base, 1 or |y| for n, and one score s per response: r* for the logistic losses.
The expected loss of a pair, -p log sigma(z) - (1-p) log sigma(-z), is least at z = logit p = r*(y) - r*(y'),
and all pairs can be at their least at once. What is left is the entropy of the labels. The others are found
by Newton's method, with a certificate. Nothing here is shared with minidpo/losses/.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minidpo.data import PairTokens
from minidpo.model import ModelConfig, Transformer, response_logps
from minidpo.packing import PackedBatch, pack

EOS = 0
MOST_STEPS = 200
GRADIENT = 1e-10  # the largest entry of the gradient at what is called a minimum


@dataclass(frozen=True)
class World:
    prompts: list[list[int]]
    responses: list[list[int]]  # to every prompt
    reference: Transformer
    rewards: Tensor  # (X, Y): r*
    sampler: Tensor  # (X, Y): mu

    @cached_property
    def batch(self) -> PackedBatch:
        """Every prompt once, followed by its Y responses: one pass scores them all."""
        return pack(PairTokens.from_responses(self.prompts, [self.responses] * len(self.prompts)))

    @cached_property
    def lengths(self) -> Tensor:
        """|y|: (X, Y), int64."""
        return torch.tensor([[len(y) for y in self.responses]] * len(self.prompts))

    @cached_property
    def reference_logps(self) -> Tensor:
        """log pi_ref(y|x): (X, Y), through the packed row that training uses."""
        with torch.no_grad():
            return response_logps(self.reference, self.batch)

    @property
    def preferences(self) -> Tensor:
        """p*(y beats y'): (X, Y, Y), the winner's axis first."""
        return torch.sigmoid(self.rewards[:, :, None] - self.rewards[:, None, :])

    def wins(self, flip_rate: float = 0.0) -> Tensor:
        """2 mu(y) mu(y') q(y beats y') / X: (X, Y, Y), how often y wins over y', drawn first or second. They
        sum to one. q is p*, of which a share is swapped."""
        meetings = self.sampler[:, :, None] * self.sampler[:, None, :] / len(self.sampler)
        q = (1 - flip_rate) * self.preferences + flip_rate * self.preferences.mT
        return 2 * meetings * q


def make_world(
    seed: int = 0, prompts: int = 2, words: int = 3, max_tokens: int = 3, hidden_size: int = 24
) -> World:
    """Draw a reference, a reward N(0, 1) per response, and a sampler that is neither uniform nor the
    reference.

    With the defaults a prompt has 1 + 3 + 9 + 27 = 40 responses. `prompts` may not exceed `words`.
    """
    torch.manual_seed(seed)
    # Prompt x is EOS (in place of a BOS) and x + 1 words, of which the first is its own. No prompt then
    # continues another, which would force one next-token distribution on two responses. Without the EOS,
    # attention with rotary positions could not tell 1 from 1 1 from 1 1 1, because an average of equal values
    # is that value.
    prompt_ids = [[EOS, *(1 + (x + k) % words for k in range(x + 1))] for x in range(prompts)]
    responses: list[list[int]] = []
    for said in range(max_tokens + 1):
        texts = itertools.product(range(1, words + 1), repeat=said)
        responses += [[*text, EOS] if said < max_tokens else [*text] for text in texts]
    config = ModelConfig(
        vocab_size=words + 1,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=hidden_size // 2,
        initializer_range=0.15,  # 4 to 8 times the usual: the reference should have likes and dislikes
        eos_token_id=EOS,
    )
    reference = Transformer(config).double()
    shape = (prompts, len(responses))
    return World(
        prompts=prompt_ids,
        responses=responses,
        reference=reference,
        rewards=torch.randn(shape, dtype=torch.float64),
        sampler=(0.5 * torch.randn(shape, dtype=torch.float64)).softmax(-1),
    )


def total_variation(first_logps: Tensor, second_logps: Tensor) -> float:
    """Half the summed difference of probabilities, 0 to 1, of the worst prompt."""
    return ((first_logps.exp() - second_logps.exp()).abs().sum(-1) / 2).max().item()


# --- the optima ---------------------------------------------------------------------------------------------


def optimal_policy(base: Tensor, scores: Tensor, beta: float, lengths: Tensor | None = None) -> Tensor:
    """Equation (1): log pi (X, Y) = base + n (scores / beta + c), n being 1 or `lengths`.

    f(c) = log sum_y exp(base + n (s / beta + c)) must be 0. f rises, is convex, and its slope, the mean of n
    under the policy, is at least 1: there is one root, and Newton's method finds it from anywhere. For n = 1
    the first step is exact, c = -log Z.
    """
    n = torch.ones_like(base) if lengths is None else lengths.to(base.dtype)
    logps = base + n * scores / beta
    while (excess := logps.logsumexp(-1, keepdim=True)).abs().max() > 1e-13:
        logps = logps - n * excess / (logps.softmax(-1) * n).sum(-1, keepdim=True)
    return logps


def beats_sampler(world: World) -> Tensor:
    """p*(y beats mu) = sum over y' of mu(y') p*(y beats y'): (X, Y), the score that IPO learns."""
    return (world.preferences * world.sampler[:, None, :]).sum(-1)


def best_policy(world: World, losses: Callable[[Tensor], Tensor]) -> Tensor:
    """log pi (X, Y) with the least expected loss. losses: log pi -> (X, Y, Y), the winner's axis first. The
    policy is the softmax of what Newton's method moves, so its probabilities always sum to one."""
    wins = world.wins()

    def expected_loss(scores: Tensor) -> Tensor:
        return (wins * losses(scores.log_softmax(-1))).sum()

    return newton(expected_loss, world.reference_logps).log_softmax(-1)


def newton(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The table, from `start` downhill, at which the gradient of a smooth `objective` is 0.

    The certificate of a minimum: no entry of the gradient exceeds 1e-10, and the Hessian has no negative
    eigenvalue. Where the objective is convex it is then the least value of all, and elsewhere of all tables
    nearby. Directions without curvature, such as a constant added to all scores of a prompt, are left alone;
    along those with a negative one the step goes downhill too. Raises RuntimeError without a certificate.
    """
    table, shape = start.flatten().clone(), start.shape

    def of(flat: Tensor) -> Tensor:
        return objective(flat.view(shape))

    for _ in range(MOST_STEPS):
        gradient = torch.func.grad(of)(table)
        eigenvalues, vectors = torch.linalg.eigh(torch.autograd.functional.hessian(of, table, vectorize=True))
        curved = eigenvalues.abs() > 1e-11 * eigenvalues.abs().max()
        along = vectors.T @ gradient
        step = vectors @ torch.where(curved, along / eigenvalues.abs(), 0.0)
        value, size = of(table), 1.0
        # At the minimum, rounding may make the value of a good step look worse by this much.
        while of(table - size * step) > value + 1e-15 * (1 + value.abs()):
            size /= 2
        table = table - size * step
        # The gain that is left; the error before this step is squared by it.
        if (gradient @ step).item() < 1e-20:
            largest = torch.func.grad(of)(table).abs().max()
            if largest > GRADIENT or (eigenvalues[curved] < 0).any():
                raise RuntimeError(f"no minimum: gradient {largest:.1e}, {eigenvalues.min():.1e}")
            return table.view(shape)
    raise RuntimeError(f"no minimum found in {MOST_STEPS} steps")
