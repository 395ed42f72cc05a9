"""What a model says of every prompt and its responses, and a reward model of texts."""

import numpy as np
import pytest
import torch

from minidpo.data import PairTokens, Prompt
from minidpo.errors import UserError
from minidpo.model import response_logps, save_reward_model
from minidpo.training import reward_scorer, scoring
from minidpo.training.reward_scorer import RewardScorer
from minidpo.training.scoring import all_logps, all_rewards, values_of_every_prompt
from tiny import naive_logps, naive_rewards, random_pairs, tiny_model, tiny_reward_model, write_tokenizer

HERE = (torch.device("cpu"), "fp32")
PAIRS = random_pairs(np.random.default_rng(0), 9)
TOKENS = PairTokens.from_pairs(PAIRS)


def close(values, expected) -> None:
    np.testing.assert_allclose(values, torch.as_tensor(expected).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_tokens", [1, 60, 10_000])
def test_all_pairs(micro_tokens):
    """However the pairs are cut into passes, log-probs and rewards are the naive ones."""
    model, scorer = tiny_model(), tiny_reward_model()
    close(all_logps(model, TOKENS, micro_tokens, *HERE), naive_logps(model, PAIRS))
    close(all_rewards(scorer, TOKENS, micro_tokens, *HERE), naive_rewards(scorer, PAIRS))


@pytest.mark.parametrize("k", [1, 3])
def test_k_responses(k):
    """A prompt may have any number of responses."""
    model, scorer = tiny_model(), tiny_reward_model()
    responses = [[pair.chosen, pair.rejected, pair.chosen[1:] or [5]][:k] for pair in PAIRS]
    tokens = PairTokens.from_responses([pair.prompt for pair in PAIRS], responses)
    for i in range(k):
        alone = [p._replace(chosen=its[i], rejected=its[i]) for p, its in zip(PAIRS, responses, strict=True)]
        close(all_logps(model, tokens, 60, *HERE)[:, i], naive_logps(model, alone)[:, 0])
        close(all_rewards(scorer, tokens, 60, *HERE)[:, i], naive_rewards(scorer, alone)[:, 0])


def test_what_is_laid_out():
    """`responses` and `scored` reach the batch, gradients are off, `compute` gives any number of columns."""
    batches = []

    def compute(batch):
        batches.append(batch)
        assert not torch.is_grad_enabled()
        return torch.stack([batch.lengths[:, 0]] * 3, dim=1)

    values = values_of_every_prompt(compute, TOKENS, 60, *HERE, responses=1, scored=0)
    np.testing.assert_array_equal(values, TOKENS.lengths[:, [1, 1, 1]])
    assert {(batch.lengths.shape[1], batch.scored) for batch in batches} == {(1, 0)}
    assert sum(len(batch.tokens) for batch in batches) == TOKENS.lengths[:, :2].sum()
    assert all(len(batch.tokens) <= 60 for batch in batches) and len(batches) > 1


def test_shares(monkeypatch):
    """Of several processes each computes its share, more of them than pairs too, and the sum is the whole."""
    model = tiny_model()
    few = TOKENS.select(np.arange(2))
    monkeypatch.setattr(scoring, "all_reduce_sum", lambda values: values)
    for pairs, ranks in ((TOKENS, 2), (few, 3)):
        monkeypatch.setattr(scoring, "ranks", lambda ranks=ranks: ranks)
        parts = []
        for rank in range(ranks):
            monkeypatch.setattr(scoring, "rank", lambda rank=rank: rank)
            parts.append(all_logps(model, pairs, 60, *HERE))
        assert all((part == 0).any() for part in parts)
        close(sum(parts), naive_logps(model, PAIRS[: len(pairs)]))


def test_no_prompts():
    """Nothing to compute is no error."""
    none = TOKENS.select(np.arange(0))
    assert (
        len(values_of_every_prompt(lambda batch: response_logps(tiny_model(), batch), none, 60, *HERE)) == 0
    )


# --- texts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> RewardScorer:
    directory = tmp_path_factory.mktemp("scorer")
    write_tokenizer(directory, ["yes no maybe a cat"], vocabulary=280)
    save_reward_model(tiny_reward_model(5, vocab_size=280), directory)
    return RewardScorer(str(directory), torch.device("cpu"))


def test_one_prompt_k_responses(scorer, monkeypatch):
    """K responses share their prompt in one pass if they fit, and get the rewards that each has alone."""
    prompts = [Prompt("a cat"), Prompt("<s>a dog?", add_special_tokens=False)]
    texts = [" yes", " no maybe", "", " a cat a cat", " yes no", " no"]
    seen = []

    def spied(model, pairs, *rest):
        seen.append(pairs)
        return all_rewards(model, pairs, *rest)

    monkeypatch.setattr(reward_scorer, "all_rewards", spied)
    rewards = scorer.rewards(prompts, texts)
    assert rewards.shape == (6,) and seen[0].lengths.shape == (2, 4)
    alone = [scorer.rewards([prompts[i // 3]], [text])[0] for i, text in enumerate(texts)]
    np.testing.assert_allclose(rewards, alone, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(reward_scorer, "MICRO_TOKENS", 12)
    np.testing.assert_allclose(scorer.rewards(prompts, texts), alone, rtol=1e-5, atol=1e-6)
    assert seen[-1].lengths.shape == (6, 2)
    for prompt, ids in zip(prompts, seen[0].bounds[:, :2], strict=True):
        assert seen[0].ids[slice(*ids)].tolist() == scorer.tokenizer.prompt_ids(prompt)


def test_what_cannot_be_scored(scorer):
    """A text longer than the reward model takes is refused, and so are rewards that are not finite."""
    with pytest.raises(
        UserError, match=r"a prompt and its sample have \d+ tokens, the reward model takes 256"
    ):
        scorer.rewards([Prompt("a cat")], [" yes", "x" * 300])
    weight = scorer._model.score.weight
    before = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="its weights are not finite numbers"):
        scorer.rewards([Prompt("a cat")], [" yes"])
    weight.data.copy_(before)
