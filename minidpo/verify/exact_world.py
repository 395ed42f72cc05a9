"""A language small enough to list, and the policy each loss must converge to in it, derived on paper.

Glossary:
    x, y, |y|     a prompt, a response, its length in scored tokens
    r*(x, y)      the true reward; p*(y beats y') = sigma(r*(x, y) - r*(x, y'))        Bradley & Terry 1952
    mu(y|x)       the sampler: a pair's responses are two independent draws from it, its label one from p*
    pi_ref        the reference: a random transformer
    g(y)          log( pi(y|x) / pi_ref(y|x) )
    Z, c          one number per prompt, fixed by the probabilities summing to one
Dimensions: X prompts, Y responses per prompt. A table is (X, Y), float64.

The words are 1, 2, ..., and EOS is 0. A response is up to T-1 words and EOS, or T words and no EOS, because a
text that was cut is scored without one. These are the leaves of the tree that sampling T tokens walks down,
so their probabilities sum to one exactly, for any transformer whose vocabulary is EOS and the words.

The losses of this table see a policy through one score per response, and their optima have the form

    log pi(y|x) = base(y) + n(y) (s(y) / beta + c)                                                  (1)

                        base          n        s
    DPO, RLHF           log pi_ref    1        r*                    Rafailov et al. 2023 Eq. 4
    DPO, averages       log pi_ref    |y|      r*
    DPO, smoothed       log pi_ref    1        s_e, see optima.py
    IPO                 log pi_ref    1        p*(y beats mu), see `beats_sampler`
    IPO, averages       log pi_ref    |y|      p*(y beats mu)
    SimPO, gamma = 0    0             |y|      r*
    SimPO, gamma > 0    0             |y|      s_gamma, see optima.py
    robust DPO          log pi_ref    1        r*, if the labels are swapped as often as it assumes

For the logistic losses with neither smoothing nor gamma: the population loss is an average of
-p log sigma(z) - (1-p) log sigma(-z), z = s(y) - s(y'), each least at z = logit p = r*(y) - r*(y'). All pairs
can be at their least at once, by s = r* + a constant, which c absorbs. What is left is the entropy of the
labels. DPO with an SFT term and ORPO have optima of another form (optima.py). KTO, APO-zero
and the hinge loss have none that training reaches (docs/derivation.md).
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minidpo.data import PairTokens
from minidpo.model import ModelConfig, Transformer, response_logps
from minidpo.packing import pack

EOS = 0


@dataclass(frozen=True)
class World:
    texts: PairTokens  # every prompt once, followed by its Y responses: one pass scores them all
    alone: PairTokens  # every response after its own copy of the prompt: X * Y prompts with one response each
    lengths: Tensor  # (X, Y) int64: |y|
    reference: Transformer
    rewards: Tensor  # (X, Y): r*
    sampler: Tensor  # (X, Y): mu

    @cached_property
    def reference_logps(self) -> Tensor:
        """log pi_ref(y|x): (X, Y), through the packed row that training uses."""
        with torch.no_grad():
            return response_logps(self.reference, pack(self.texts))

    @property
    def preferences(self) -> Tensor:
        """p*(y beats y'): (X, Y, Y), the winner's axis first."""
        return torch.sigmoid(self.rewards[:, :, None] - self.rewards[:, None, :])

    @property
    def meetings(self) -> Tensor:
        """mu(y) mu(y') / X: (X, Y, Y), how often a pair is drawn, y = y' included; they sum to one."""
        return self.sampler[:, :, None] * self.sampler[:, None, :] / len(self.sampler)


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
    responses = list_responses(words, max_tokens)
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
        texts=PairTokens.from_responses(prompt_ids, [responses] * prompts),
        alone=PairTokens.from_responses(
            [prompt for prompt in prompt_ids for _ in responses], [[y] for y in responses] * prompts
        ),
        lengths=torch.tensor([[len(y) for y in responses]] * prompts),
        reference=reference,
        rewards=torch.randn(shape, dtype=torch.float64),
        sampler=(0.5 * torch.randn(shape, dtype=torch.float64)).softmax(-1),
    )


def list_responses(words: int, max_tokens: int) -> list[list[int]]:
    """Every response: w...w EOS of 1 up to `max_tokens` tokens, then w...w cut at `max_tokens`."""

    def texts(length: int) -> list[list[int]]:
        return [list(text) for text in itertools.product(range(1, words + 1), repeat=length)]

    return [[*text, EOS] for length in range(max_tokens) for text in texts(length)] + texts(max_tokens)


# --- what must come out -------------------------------------------------------------------------------------


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
    """p*(y beats mu) = sum over y' of mu(y') p*(y beats y'): (X, Y). It is the score that IPO learns.

    Azar et al. 2023, Eq. 17 asks for (h - 1/(2 beta))^2 on labelled pairs, h = g(winner) - g(loser). A pair
    y, y' has y as its winner with probability p = p*(y beats y'), and then h = h(y, y') = g(y) - g(y'); else
    h = -h(y, y'):

        p (h - 1/(2 beta))^2 + (1-p) (-h - 1/(2 beta))^2 = (h - a)^2 + const,   a(y, y') = (2p - 1)/(2 beta)

    So g(y) - g(y') is fitted to a by least squares with weights mu(y) mu(y'). The derivative in g(y) is set
    to zero, where a(y, y') = -a(y', y) makes y's part as winner and as loser the same:

        sum over y' of mu(y') (g(y) - g(y') - a(y, y')) = 0
        g(y) = mean of g under mu + (2 p*(y beats mu) - 1) / (2 beta) = p*(y beats mu) / beta + const

    a is not a difference of scores when there are three responses or more, so single pairs miss their target
    and the answer depends on mu, unlike DPO's. With averages g(y) / |y| takes the place of g(y) everywhere.
    """
    return (world.preferences * world.sampler[:, None, :]).sum(-1)


def ipo_minimum(world: World, beta: float) -> float:
    """The IPO loss at its optimum: 1/(4 beta^2) - E h^2 = 1/(4 beta^2) - 2 Var_mu(p*(y beats mu)) / beta^2.

    Expanding the labelled loss gives E h^2 - 2 E[h a] + 1/(4 beta^2); the residual of a least-squares fit is
    orthogonal to the fit, E[h a] = E h^2. Both draws are independent, so E h^2 is twice a variance.
    """
    wins = beats_sampler(world)
    mean = (world.sampler * wins).sum(-1, keepdim=True)
    variance = (world.sampler * (wins - mean).square()).sum(-1)
    return (1 / (4 * beta**2) - 2 * variance / beta**2).mean().item()


def label_entropy(world: World) -> float:
    """-E[p log p + (1-p) log(1-p)], nats: what is left of a Bradley-Terry loss when the scores are r*."""
    p = world.preferences
    return (world.meetings * (torch.special.entr(p) + torch.special.entr(1 - p))).sum().item()


def rlhf_maximum(world: World, beta: float) -> float:
    """max over pi of E_pi r* - beta KL(pi, pi_ref): beta log Z, Z = E_pi_ref exp(r*/beta); mean over prompts.

    Since E_pi r* - beta KL(pi, pi_ref) = beta log Z - beta KL(pi, pi*) with pi* = pi_ref exp(r*/beta) / Z.
    """
    return (beta * (world.reference_logps + world.rewards / beta).logsumexp(-1)).mean().item()


# --- how far apart, how good --------------------------------------------------------------------------------


def total_variation(first_logps: Tensor, second_logps: Tensor) -> float:
    """Half the summed difference of probabilities, 0 to 1, of the worst prompt."""
    return ((first_logps.exp() - second_logps.exp()).abs().sum(-1) / 2).max().item()


def expected_reward(world: World, logps: Tensor) -> float:
    """E_pi r*, mean over prompts: exact, because every response is listed."""
    return (logps.exp() * world.rewards).sum(-1).mean().item()


def divergence(world: World, logps: Tensor) -> float:
    """KL(pi, pi_ref) in nats, mean over prompts: exact."""
    return (logps.exp() * (logps - world.reference_logps)).sum(-1).mean().item()
