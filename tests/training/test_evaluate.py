"""Sampled evaluation: its estimates are what they claim, and a run that samples says what its policy says."""

import json
import math

import numpy as np
import pytest
import torch

import train_rm
from minidpo.data import PairOrder
from minidpo.errors import UserError
from minidpo.log import console_line
from minidpo.model import Sampling, generate
from minidpo.training import evaluate
from minidpo.training.evaluate import distinct, divergences
from minidpo.training.reward_scorer import mean_and_error
from runs import final
from runs import run_dpo as run
from tiny import EOS, tiny_model

HERE = (torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def two_models():
    """A policy and a reference of 11 tokens that may say two, and the exact KL between them."""
    return tiny_model(0, vocab_size=11), tiny_model(1, vocab_size=11)


def exact_kl(policy, reference, prompt: list[int]) -> float:
    """KL over all answers of at most two tokens: EOS, or a token and whatever comes next."""
    answers = [[EOS]] + [[first, second] for first in range(11) if first != EOS for second in range(11)]
    total = 0.0
    with torch.no_grad():
        for answer in answers:
            logps = []
            for model in (policy, reference):
                steps = model(torch.tensor([prompt + answer]))[0].double().log_softmax(-1)
                logps.append(sum(steps[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)))
            total += math.exp(logps[0]) * (logps[0] - logps[1])
    return total


def test_both_estimates_of_the_kl_meet_the_exact_one_and_the_chain_rule_varies_less(two_models):
    policy, reference = two_models
    prompts = [[4, 5, 6], [7]] * 1500  # of two lengths, so that there is padding
    samples = generate(policy, prompts, Sampling(max_new_tokens=2), EOS, seed=0, batch_size=3000)
    apart = divergences(policy, reference, prompts, samples, *HERE)  # (samples, 2): log-ratios, next tokens
    exact = (exact_kl(policy, reference, [4, 5, 6]) + exact_kl(policy, reference, [7])) / 2
    assert exact > 0.3
    for mean, error in map(mean_and_error, apart.T):
        assert abs(mean - exact) < 4 * error
    assert apart[:, 1].std() < 0.7 * apart[:, 0].std()
    assert apart[:, 1].min() >= 0 > apart[:, 0].min()


def test_the_kls_of_next_tokens_are_added_up_from_the_prompts_last_token_to_the_one_before_the_answers_last(
    two_models,
):
    prompts, answers = [[4, 5, 6], [7]], [[8, EOS], [9, 10, 3, EOS]]
    both = divergences(*two_models, prompts, answers, *HERE)
    with torch.no_grad():
        for prompt, answer, found in zip(prompts, answers, both[:, 1], strict=True):
            by_hand = 0.0
            for t in range(len(answer)):
                p, q = (
                    m(torch.tensor([prompt + answer[:t]]))[0, -1].double().log_softmax(-1) for m in two_models
                )
                by_hand += (p.exp() * (p - q)).sum().item()
            assert found == pytest.approx(by_hand, rel=1e-4)


def test_a_policy_that_is_the_reference_is_at_zero(two_models):
    policy, _ = two_models
    assert np.abs(divergences(policy, policy, [[4, 5], [6]], [[7, EOS], [8]], *HERE)).max() < 1e-6


def test_distinct_n_is_the_share_of_different_n_grams():
    assert distinct([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # 12 21 12, 12
    assert distinct([[7]], 2) == 0.0


@pytest.fixture
def sampling(config):
    return config(eval__samples=6, eval__max_new_tokens=12, run__eval_every=2)


def evaluations(metrics: list[dict]) -> list[dict]:
    return [line for line in metrics if "eval/kl" in line]


def test_at_step_0_the_policy_says_what_the_reference_says(sampling, tmp_path):
    first, middle, last = evaluations(run(sampling))
    assert first["eval/kl"] == first["eval/kl_of_log_ratios"] == first["eval/sample_length_change"] == 0.0
    assert middle["eval/kl"] > 0 and last["eval/kl"] > middle["eval/kl"]
    assert last["eval/kl_standard_error"] > 0
    lines = [json.loads(line) for line in (tmp_path / "out/samples/step-4.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and len({line["prompt"] for line in lines}) == 6
    assert last["eval/sample_length"] == pytest.approx(np.mean([line["tokens"] for line in lines]))
    assert last["eval/kl_of_log_ratios"] == pytest.approx(np.mean([line["log_ratio"] for line in lines]))
    assert last["eval/kl_per_token"] == pytest.approx(
        6 * last["eval/kl"] / sum(line["tokens"] for line in lines)
    )
    assert last["eval/ended"] == np.mean([line["ended"] for line in lines])


@pytest.mark.parametrize(("reference", "sampled"), [("model", 1 + 2), ("other", 1 + 3)])
def test_at_step_0_what_the_reference_has_said_is_not_sampled_again(
    sampling, world, monkeypatch, reference, sampled
):
    calls, real = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda *a, **k: calls.append(a) or real(*a, **k))
    first = evaluations(run(sampling, f"--reference.path={world / reference}"))[0]
    assert len(calls) == sampled and (first["eval/kl"] == 0) == (reference == "model")


def test_sampling_changes_nothing_of_the_training(sampling, config, tmp_path):
    run(sampling)
    sampled = final(tmp_path / "out")
    run(config(run__eval_every=2), f"--run.out={tmp_path / 'silent'}")
    assert all(torch.equal(tensor, sampled[name]) for name, tensor in final(tmp_path / "silent").items())


def test_a_run_that_samples_resumes_bit_for_bit(sampling, tmp_path, monkeypatch):
    whole = run(sampling, f"--run.out={tmp_path / 'whole'}")
    real = PairOrder.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(PairOrder, "__getitem__", lambda order, step: real(order, step) if step < 3 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(sampling, "--run.save_every=1")
    resumed = run(sampling, "--run.save_every=1")

    def without_speed(metrics: list[dict]) -> list[dict]:
        return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in metrics]

    assert without_speed(resumed) == without_speed(whole)
    one, other = ((tmp_path / out / "samples" / "step-4.jsonl").read_text() for out in ("whole", "out"))
    assert one == other


def test_a_reward_model_of_the_other_script_judges_the_samples(sampling, config, tmp_path):
    train_rm.main([*config(), f"--run.out={tmp_path / 'rm'}"])
    config(
        eval__samples=6, eval__max_new_tokens=12, run__eval_every=2
    )  # the file again, which was overwritten
    judge = f"--eval.reward_model={tmp_path / 'rm' / 'final'}"
    first, *_, last = evaluations(run(sampling, judge, f"--run.out={tmp_path / 'judged'}"))
    assert (
        first["eval/win_rate"] == 0.0 and first["eval/tie_rate"] == 1.0
    )  # its own samples, against themselves
    assert first["eval/reward"] == first["eval/reward_of_reference"] == last["eval/reward_of_reference"]
    lines = [json.loads(line) for line in (tmp_path / "judged/samples/step-4.jsonl").read_text().splitlines()]
    assert last["eval/reward"] == pytest.approx(np.mean([line["reward"] for line in lines]))
    assert last["eval/win_rate"] + last["eval/tie_rate"] <= 1


def test_what_leaves_no_room_for_samples_is_refused_before_training(sampling, tmp_path):
    with pytest.raises(UserError, match="eval.max_new_tokens = 250 after a prompt of .* the model takes 256"):
        run(sampling, "--eval.max_new_tokens=250")
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_mean_over_samples_stands_on_the_line_with_its_standard_error():
    values = {"step": 250, "eval/kl": 6.09, "eval/kl_standard_error": 4.18, "eval/sample_length": 11.7}
    assert console_line(values, 250, 0, "eval/") == "eval 250/250  KL   6.09 ± 4.18  length  11.7"
