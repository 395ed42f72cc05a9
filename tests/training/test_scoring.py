"""What a model says of every prompt and its responses, and a reward model of texts."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minidpo.data import PairTokens, Prompt
from minidpo.errors import UserError
from minidpo.model import save_reward_model
from minidpo.training import scoring
from minidpo.training.reward_scorer import RewardScorer
from minidpo.training.scoring import all_logps, all_rewards, values_of_every_prompt
from padded import saved_weights
from runs import run_dpo
from tiny import naive_logps, naive_rewards, random_pairs, tiny_model, tiny_reward_model, write_tokenizer

HERE = (torch.device("cpu"), "fp32")
PAIRS = random_pairs(np.random.default_rng(0), 9)
TOKENS = PairTokens.from_pairs(PAIRS)


def close(values, expected) -> None:
    np.testing.assert_allclose(values, torch.as_tensor(expected).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "micro_tokens"), [(2, 1), (1, 60), (2, 60), (3, 60), (2, 10_000)])
def test_all_pairs(k, micro_tokens):
    """However K responses per prompt are cut into passes, log-probs and rewards are the naive ones."""
    model, scorer = tiny_model(), tiny_reward_model()
    responses = [[pair.chosen, pair.rejected, pair.chosen[1:] or [5]][:k] for pair in PAIRS]
    tokens = PairTokens.from_responses([pair.prompt for pair in PAIRS], responses)
    logps = all_logps(model, tokens, micro_tokens, *HERE)
    rewards = all_rewards(scorer, tokens, micro_tokens, *HERE)
    for i in range(k):
        alone = [p._replace(chosen=its[i], rejected=its[i]) for p, its in zip(PAIRS, responses, strict=True)]
        close(logps[:, i], naive_logps(model, alone)[:, 0])
        close(rewards[:, i], naive_rewards(scorer, alone)[:, 0])


def test_batches():
    """`scored` reaches the batch, gradients are off, and `compute` gives any number of columns."""
    batches = []

    def compute(model, batch):
        batches.append(batch)
        assert not torch.is_grad_enabled()
        return torch.stack([batch.lengths[:, 0]] * 3, dim=1)

    values = values_of_every_prompt(compute, None, TOKENS, 60, *HERE, scored=0)
    close(values, TOKENS.lengths[:, [1, 1, 1]])
    assert {batch.scored_responses for batch in batches} == {0}
    assert all(len(batch.tokens) <= 60 for batch in batches) and len(batches) > 1
    assert len(values_of_every_prompt(compute, None, TOKENS.select(np.arange(0)), 60, *HERE)) == 0


@pytest.mark.parametrize(("count", "ranks"), [(9, 2), (2, 3)])
def test_shares(monkeypatch, count, ranks):
    """Of several processes each computes its share, more of them than pairs too, and the sum is the whole."""
    model, pairs, parts = tiny_model(), TOKENS.select(np.arange(count)), []
    monkeypatch.setattr(scoring, "ranks", lambda: ranks)
    monkeypatch.setattr(scoring, "all_reduce_sum", lambda values: parts.append(values) or values)
    for rank in range(ranks):
        monkeypatch.setattr(scoring, "rank", lambda rank=rank: rank)
        all_logps(model, pairs, 60, *HERE)
    assert all((part == 0).any() for part in parts)
    close(sum(parts), naive_logps(model, PAIRS[:count]))


def test_bad_reference(world, config, tmp_path):
    """A reference with a NaN among its weights is named before training."""
    bad = shutil.copytree(world / "other", tmp_path / "bad")
    weights = saved_weights(bad)
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, bad / "model.safetensors")
    with pytest.raises(UserError, match=r"/bad: the model's numbers are not finite"):
        run_dpo(config(), f"--reference.path={bad}")
    assert not (tmp_path / "out" / "reference.safetensors").exists()


@pytest.fixture
def scorer(tmp_path) -> RewardScorer:
    write_tokenizer(tmp_path, ["yes no maybe a cat"], vocabulary=280)
    save_reward_model(tiny_reward_model(5, vocab_size=280), tmp_path)
    return RewardScorer(str(tmp_path), torch.device("cpu"))


def test_texts(scorer):
    """K responses share their prompt, and get the rewards that each has alone."""
    prompts = [Prompt("a cat"), Prompt("<s>a dog?", add_special_tokens=False)]
    texts = [" yes", " no maybe", "", " a cat a cat", " yes no", " no"]
    alone = [scorer.rewards([prompts[i // 3]], [text])[0] for i, text in enumerate(texts)]
    close(scorer.rewards(prompts, texts), alone)


def test_refused_texts(scorer):
    """A text longer than the reward model takes is refused, and so are rewards that are not finite."""
    with pytest.raises(UserError, match=r"sample have \d+ tokens, the reward model takes 256"):
        scorer.rewards([Prompt("a cat")], [" yes", "x" * 300])
    scorer._model.score.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="the model's numbers are not finite"):
        scorer.rewards([Prompt("a cat")], [" yes"])
