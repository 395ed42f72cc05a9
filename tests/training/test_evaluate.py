"""Sampled evaluation: each estimate against what it estimates, each figure of a run against its samples."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minidpo.log import console_line
from minidpo.model import Sampling, load_model
from minidpo.training import evaluate
from minidpo.training.evaluate import distinct
from minidpo.training.reward_scorer import RewardScorer, mean_and_error, text_after, with_error
from padded import saved_weights
from record_files import read
from runs import final, run_dpo, run_rm
from tiny import EOS

SETTINGS = dict(eval__samples=6, eval__max_new_tokens=12, run__eval_every=2)


def test_standard_error():
    """Of 1, 2, 3, 4: the variance is (2.25 + 0.25 + 0.25 + 2.25) / 3 = 1.6667; sqrt(1.6667 / 4) = 0.6455."""
    assert mean_and_error(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, 0.6455), abs=1e-4)
    assert with_error(np.array([1.0, 2.0, 3.0, 4.0]), "8.3f") == "   2.500 ± 0.645"
    assert math.isnan(mean_and_error(np.array([1.0]))[1])
    assert with_error(np.array([1.0]), ".3f") == "1.000"


def test_distinct():
    """Different n-grams over the number of tokens (Li et al. 2016)."""
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 6  # 12 21 12 and 12: two kinds, of six tokens
    assert distinct([[1, 2, 3]], 2) == 2 / 3 and distinct([[7]], 2) == 0.0


def test_console_line():
    """A mean over samples stands there with its standard error."""
    values = {"step": 250, "eval/kl": 6.09, "eval/kl_standard_error": 4.18, "eval/sample_length": 11.7}
    assert console_line(values, 250, 0) == "eval 250/250  KL   6.09 ± 4.18  length  11.7"


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sampling(config) -> list[str]:
    return config(**SETTINGS)


@pytest.fixture
def rounds(monkeypatch) -> list[tuple]:
    """(Sampling, prompts, samples) of every round of sampling of a run, the reference's first."""
    rounds, real = [], evaluate.generate

    def recording(model, prompts, sampling, *more, **named):
        rounds.append((sampling, prompts, real(model, prompts, sampling, *more, **named)))
        return rounds[-1][-1]

    monkeypatch.setattr(evaluate, "generate", recording)
    return rounds


def require(line: dict, figures: dict) -> None:
    assert {name: line[f"eval/{name}"] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-6)


@torch.no_grad()
def divergence(policy, reference, prompt: list[int], response: list[int]) -> float:
    """The KL of both next-token distributions, summed over the response: over all responses that the policy
    may draw, its mean is KL(policy || reference)."""
    p, q = (  # (T, V): the logits at t - 1 predict token t, from the prompt's last on
        model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        for model in (policy, reference)
    )
    return (p.exp() * (p - q)).sum().item()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_figures(sampling, rounds, world, tmp_path, monkeypatch, dtype):
    """Every figure follows from the samples, in float32 also where the run trains in bf16."""
    monkeypatch.setattr(evaluate, "tokens_per_chunk", lambda *of: 5)  # Next-token KLs come five at a time.
    for name in ("model", "other"):  # Copies to which EOS comes easily: their responses differ in length.
        shutil.copytree(world / name, tmp_path / name)
        weights = saved_weights(world / name)
        weights["lm_head.weight"][EOS] *= 16
        save_file(weights, tmp_path / name / "model.safetensors")
    models = [f"--model.path={tmp_path / 'model'}", f"--reference.path={tmp_path / 'other'}"]
    lines = run_dpo(sampling, *models, f"--run.dtype={dtype}")
    reference, of_reference = load_model(tmp_path / "other"), rounds[0][-1]
    for line, directory, (law, prompts, samples) in (
        (lines[0], tmp_path / "model", rounds[1]),
        (lines[-1], tmp_path / "out" / "final", rounds[-1]),
    ):
        policy = load_model(directory)
        both = zip(prompts, samples, strict=True)
        kls = np.array([divergence(policy, reference, *each) for each in both])
        assert (kls >= 0).all()
        lengths = np.array([len(response) for response in samples])
        ended = [response[-1] == EOS for response in samples]
        mean, error = mean_and_error(kls)
        figures = {"kl": mean, "kl_standard_error": error, "kl_of_worst": kls.max()}
        # The mean of each response's own ratio is another number: long responses would count too little.
        figures |= {"kl_per_token": kls.sum() / lengths.sum()}
        figures |= {"sample_length": lengths.mean(), "ended": np.mean(ended)}
        figures["sample_length_change"] = lengths.mean() - np.mean([len(ids) for ids in of_reference])
        require(line, figures)
        assert law == Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0)
        rows = read(tmp_path / "out" / "samples" / f"step-{line['step']}.jsonl")
        assert len(rows) == len({row["prompt"] for row in rows}) == 6
        assert [(row["tokens"], row["ended"]) for row in rows] == list(zip(lengths, ended, strict=True))
        assert [row["kl"] for row in rows] == pytest.approx(kls, rel=1e-4, abs=1e-6)


def test_rewards_and_wins(config, rounds, tokenizer, tmp_path, monkeypatch):
    """They follow from the policy's samples and the reference's, judged by a model of the other script, whose
    rewards are rounded here, for ties."""
    exact = RewardScorer.rewards
    monkeypatch.setattr(RewardScorer, "rewards", lambda *given: exact(*given).round())
    directory = tmp_path / "rm" / "final"
    run_rm(config(), f"--run.out={tmp_path / 'rm'}")
    *_, line = run_dpo(config(**SETTINGS), f"--eval.reward_model={directory}")
    scorer = RewardScorer(str(directory), torch.device("cpu"))

    def rewards(_, prompts: list[list[int]], samples: list[list[int]]) -> np.ndarray:
        texts = [text_after(tokenizer, *both) for both in zip(prompts, samples, strict=True)]
        return scorer.rewards(list(map(tokenizer.prompt, prompts)), texts)

    policy, reference = rewards(*rounds[-1]), rewards(*rounds[0])
    assert 0 < np.mean(policy > reference) < np.mean(policy >= reference) < 1
    mean, error = mean_and_error(policy)
    figures = {"reward": mean, "reward_standard_error": error, "reward_of_reference": reference.mean()}
    figures |= {"win_rate": np.mean(policy > reference), "tie_rate": np.mean(policy == reference)}
    require(line, figures)
    rows = read(tmp_path / "out" / "samples" / "step-4.jsonl")
    assert [row["reward"] for row in rows] == pytest.approx(policy, abs=1e-5)


def test_independent_draws(sampling, rounds):
    """A policy equal to its reference has KL 0 and draws other responses: one seed would make ties."""
    start, *_ = run_dpo(sampling, "--optim.max_steps=2", "--optim.lr=1e-12")
    assert start["eval/kl"] == 0.0
    reference, first, last = (samples for _, _, samples in rounds)
    assert first == last and not any(a == b for a, b in zip(reference, first, strict=True))


def test_one_sample(sampling):
    """A mean of one response has no standard error: its key is left out, for NaN is no JSON."""
    first, *_ = run_dpo(sampling, "--eval.samples=1", "--optim.max_steps=1")
    assert "eval/kl" in first and "eval/kl_standard_error" not in first


def test_same_training(sampling, config, tmp_path):
    """Sampling changes nothing of the training."""
    run_dpo(sampling)
    sampled = final(tmp_path / "out")
    run_dpo(config(run__eval_every=2), f"--run.out={tmp_path / 'silent'}")
    assert all(torch.equal(tensor, sampled[name]) for name, tensor in final(tmp_path / "silent").items())
