"""What a model of the demo's world says: answers sampled, and judged by rule."""

from typing import NamedTuple

from minidpo.commands.world import Judgement, judge
from minidpo.generate import Sampling, generate
from minidpo.model import Transformer
from minidpo.tokenizer import Tokenizer

LONGEST_ANSWER = 40  # tokens; the longest in the data has about 25


class Answers(NamedTuple):
    """One sampled answer a prompt."""

    texts: list[str]
    tokens: list[list[int]]  # EOS included, where there is one
    judgements: list[Judgement]


def answer(model: Transformer, tokenizer: Tokenizer, prompts: list[str], seed: int = 0) -> Answers:
    """Sample one answer a prompt, at temperature 1 because KL is about that distribution, and judge it."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = generate(model, ids, Sampling(max_new_tokens=LONGEST_ANSWER), tokenizer.eos_id, seed)
    ended = [row[:-1] if row[-1] == tokenizer.eos_id else row for row in tokens]
    texts = [tokenizer.decode(row) for row in ended]
    return Answers(texts, tokens, [judge(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
