"""Sampled evaluation: the law it samples from, and each of its figures worked out again from the samples.

All is computed here from whole forward passes over one text at a time, without cache, packing or padding.
"""

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from minidpo.model import Sampling, generate, load_model
from minidpo.training import evaluate
from minidpo.training.reward_scorer import mean_and_error
from padded import saved_weights
from runs import run_dpo, run_rm
from tiny import EOS, tiny_model

SAMPLES, NEW_TOKENS = 6, 12


@pytest.fixture
def sampling(config) -> list[str]:
    return config(eval__samples=SAMPLES, eval__max_new_tokens=NEW_TOKENS)


@pytest.fixture
def recorded(monkeypatch) -> list[tuple]:
    """(Sampling, prompts, samples) of every round of sampling of a run, the reference's first."""
    rounds, real = [], evaluate.generate

    def recording(model, prompts, sampling, *more, **options):
        samples = real(model, prompts, sampling, *more, **options)
        rounds.append((sampling, prompts, samples))
        return samples

    monkeypatch.setattr(evaluate, "generate", recording)
    return rounds


# --- the law ------------------------------------------------------------------------------------------------


def test_policy_and_reference_are_sampled_at_temperature_1_from_all_tokens(sampling, recorded, world):
    run_dpo(sampling, f"--reference.path={world / 'other'}")
    assert len(recorded) == 3  # the reference, then the policy before and after training
    for law, _, _ in recorded:
        assert law == Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, top_p=1.0)


def test_at_these_settings_a_response_comes_as_often_as_the_model_says():
    """A chi-square test of 50,000 responses of up to two of 8 tokens: EOS alone, or one of 7 * 8."""
    model, prompt, draws = tiny_model(vocab_size=8), [3, 4, 5], 50_000
    law = Sampling(max_new_tokens=2, temperature=1.0, top_p=1.0)
    seen = Counter(map(tuple, generate(model, [prompt] * draws, law, EOS, seed=0, batch_size=draws)))

    def next_token(text: list[int]) -> list[float]:
        with torch.no_grad():
            return model(torch.tensor([text]))[0, -1].double().softmax(-1).tolist()

    expected = {(EOS,): draws * next_token(prompt)[EOS]}
    for first, p in enumerate(next_token(prompt)):
        if first != EOS:
            for second, q in enumerate(next_token([*prompt, first])):
                expected[first, second] = draws * p * q
    assert sum(expected.values()) == pytest.approx(draws) and min(expected.values()) > 5
    chi_square = sum((seen[response] - count) ** 2 / count for response, count in expected.items())
    freedom = len(expected) - 1
    assert freedom == 7 * 8
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # its mean and standard deviation


# --- the figures --------------------------------------------------------------------------------------------


def test_the_standard_error_of_a_mean():
    """Of 1, 2, 3, 4: the variance is (2.25 + 0.25 + 0.25 + 2.25) / 4 = 1.25, and sqrt(1.25 / 4) = 0.5590."""
    mean, error = mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]))
    assert mean == 2.5
    assert error == pytest.approx(0.5590, abs=1e-4)


def divergences(policy, reference, prompt: list[int], response: list[int]) -> tuple[float, float]:
    """log pi/pi_ref of the response, and the KL of both next-token distributions summed over it."""
    with torch.no_grad():
        p, q = (  # (T, V): the logits at t - 1 predict token t, from the prompt's last on
            model(torch.tensor([prompt + response]))[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for model in (policy, reference)
        )
    log_ratio = sum((p - q)[t, token].item() for t, token in enumerate(response))
    return log_ratio, (p.exp() * (p - q)).sum().item()


@pytest.fixture
def brief(world, tmp_path):
    """A directory with copies of both models to which EOS comes easily: their responses differ in length."""
    for name in ("model", "other"):
        shutil.copytree(world / name, tmp_path / name)
        weights = saved_weights(world / name)
        weights["lm_head.weight"][EOS] *= 16
        save_file(weights, tmp_path / name / "model.safetensors")
    return tmp_path


def test_every_figure_follows_from_the_samples(sampling, recorded, brief, tmp_path):
    before, *_, after = run_dpo(
        sampling, f"--model.path={brief / 'model'}", f"--reference.path={brief / 'other'}"
    )
    reference, (_, _, of_reference) = load_model(brief / "other"), recorded[0]
    for line, directory, (_, prompts, samples) in [
        (before, brief / "model", recorded[1]),
        (after, tmp_path / "out" / "final", recorded[2]),
    ]:
        policy = load_model(directory)
        each = [divergences(policy, reference, *both) for both in zip(prompts, samples, strict=True)]
        log_ratios, kls = np.array(each).T
        lengths = np.array([len(response) for response in samples])
        assert len(samples) == SAMPLES
        # The mean of each response's own ratio is another number: long responses would count too little.
        assert kls.sum() / lengths.sum() != pytest.approx((kls / lengths).mean(), rel=1e-3)
        figures = {
            "kl": kls.mean(),
            "kl_standard_error": math.sqrt(((kls - kls.mean()) ** 2).mean() / SAMPLES),
            "kl_of_worst": kls.max(),
            "kl_per_token": kls.sum() / lengths.sum(),
            "kl_of_log_ratios": log_ratios.mean(),
            "sample_length": lengths.mean(),
            "sample_length_change": lengths.mean() - np.mean([len(response) for response in of_reference]),
            "ended": np.mean([response[-1] == EOS for response in samples]),
        }
        require_figures(line, figures)


def test_rewards_and_wins_follow_from_the_samples(config, tmp_path):
    """At step 0 policy and reference are one model, so the samples of that step are the reference's too."""
    run_rm(config(), f"--run.out={tmp_path / 'rm'}")
    arguments = config(eval__samples=SAMPLES, eval__max_new_tokens=NEW_TOKENS)
    *_, after = run_dpo(arguments, f"--eval.reward_model={tmp_path / 'rm' / 'final'}")

    def rewards(step: int) -> np.ndarray:
        lines = (tmp_path / "out" / "samples" / f"step-{step}.jsonl").read_text().splitlines()
        return np.array([json.loads(line)["reward"] for line in lines])

    policy, reference = rewards(4), rewards(0)
    assert 0 < np.mean(policy > reference) < 1
    figures = {
        "reward": policy.mean(),
        "reward_standard_error": math.sqrt(((policy - policy.mean()) ** 2).mean() / SAMPLES),
        "reward_of_reference": reference.mean(),
        "win_rate": np.mean(policy > reference),
        "tie_rate": np.mean(policy == reference),
    }
    require_figures(after, figures)


def require_figures(line: dict, figures: dict) -> None:
    assert {name: line[f"eval/{name}"] for name in figures} == pytest.approx(figures, rel=1e-4, abs=1e-6)
