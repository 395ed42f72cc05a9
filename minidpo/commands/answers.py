"""What a model of the demo's world says: answers sampled, judged by rule, and held against the reference's."""

from typing import NamedTuple

import torch
from torch import Tensor

from minidpo.commands.world import Judgement, judge
from minidpo.generate import Sampling, generate
from minidpo.logprobs import sequence_logps
from minidpo.model import Transformer
from minidpo.tokenizer import Tokenizer

LONGEST_ANSWER = 40  # tokens; the longest in the data has about 25


class Answers(NamedTuple):
    """One sampled answer a prompt."""

    texts: list[str]
    tokens: list[list[int]]  # EOS included, where there is one
    judgements: list[Judgement]


class Divergences(NamedTuple):
    """Two estimates of KL(policy || reference) from each sampled answer y, (R,) nats; the mean of either is unbiased."""

    log_ratios: Tensor  # log pi(y) - log pi_ref(y): plain, and may be negative
    token_kls: (
        Tensor  # sum over the tokens of y of the next token's KL, given what stands before: never negative
    )


def answer(model: Transformer, tokenizer: Tokenizer, prompts: list[str], seed: int = 0) -> Answers:
    """Sample one answer a prompt, at temperature 1 because KL is about that distribution, and judge it."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = generate(model, ids, Sampling(max_new_tokens=LONGEST_ANSWER), tokenizer.eos_id, seed)
    ended = [row[:-1] if row[-1] == tokenizer.eos_id else row for row in tokens]
    texts = [tokenizer.decode(row) for row in ended]
    return Answers(texts, tokens, [judge(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])


@torch.no_grad()
def divergences(
    policy: Transformer, reference: Transformer, prompts: list[list[int]], samples: list[list[int]]
) -> Divergences:
    """Both estimates for `samples`, the policy's own answers to `prompts` (token ids).

    By the chain rule KL = E_y sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)): what the next token could have been
    is summed over exactly, and only the prefix is left to chance. Hence its mean varies far less.
    """
    width = max(len(prompt) + len(sample) for prompt, sample in zip(prompts, samples, strict=True))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)  # (R, T), padded on the right
    scored = torch.zeros(len(prompts), width, dtype=torch.bool)  # (R, T)
    for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        tokens[i, : len(prompt) + len(sample)] = torch.tensor([*prompt, *sample])
        scored[i, len(prompt) : len(prompt) + len(sample)] = True
    logits, reference_logits = policy(tokens), reference(tokens)  # (R, T, V)
    policy_logps, reference_logps = (
        sequence_logps(each, tokens, scored)[0] for each in (logits, reference_logits)
    )
    chosen_by, compared_with = logits.log_softmax(-1), reference_logits.log_softmax(-1)
    next_token = (chosen_by.exp() * (chosen_by - compared_with)).sum(-1)  # (R, T): at t of the token t + 1
    return Divergences(policy_logps - reference_logps, (next_token[:, :-1] * scored[:, 1:]).sum(-1))
