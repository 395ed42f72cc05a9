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

optima.py has the policies that must come out, exact_train.py the training.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minidpo.data import PairTokens
from minidpo.model import ModelConfig, Transformer, response_logps
from minidpo.packing import PackedBatch, pack

EOS = 0


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
