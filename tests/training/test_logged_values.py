"""What metrics.jsonl says of a step or an evaluation, against two padded rows per pair.

The five pairs of padded.py are trained on and held out at once, so a line of training and the evaluation
before it are of the same pairs under the same weights.
"""

import shutil
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import logsigmoid

import train_dpo
import train_rm
from applied import applied_gradients
from padded import (
    PAIRS,
    Values,
    chosen_minus_rejected,
    model_of,
    padded_values,
    pair_ids,
    saved_weights,
    write_pairs,
)
from runs import metrics, run_dpo, run_rm, steps

SATURATED = "saturated"
SCRIPTS = pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])


@pytest.fixture
def both_sets(five_pairs, tmp_path) -> list[str]:
    """Two steps on the five pairs, which are held out too (last first), with evaluations before and after."""
    held_out = write_pairs(tmp_path / "held_out.jsonl", reversed(PAIRS))
    return [*five_pairs, f"--data.eval={held_out}", "--run.eval_every=1"]


@torch.no_grad()
def values_of(weights: dict[str, Tensor], world) -> Values:
    return padded_values(model_of(weights), pair_ids(world / "model"))


def require_logged(script, arguments: list[str], expected, tmp_path) -> None:
    """expected(weights) holds metrics of these weights, (5,) each, whose means are to be logged."""
    first, second = (step.weights for step in applied_gradients(script.main, arguments))
    before, step_1, between, step_2, _ = metrics(tmp_path / "out")
    for line, prefix, weights in [
        (before, "eval/", first),
        (step_1, "", first),
        (between, "eval/", second),
        (step_2, "", second),
    ]:
        for name, values in expected(weights).items():
            mean = values.double().mean().item()
            assert line[prefix + name] == pytest.approx(mean, rel=1e-4, abs=1e-5), (line, name)


# --- train_dpo.py -------------------------------------------------------------------------------------------

PREFERENCE_LOSSES = [  # rewards (5, 2) of both responses, the loss from the margin between them
    (
        "--loss.name=dpo --loss.beta=0.3",
        lambda pi, ref: 0.3 * (pi.logps - ref.logps),
        lambda margin: -logsigmoid(margin),
    ),
    (
        "--loss.name=dpo --loss.beta=9 --loss.length_normalize=true",
        lambda pi, ref: 9 * (pi.logps - ref.logps) / pi.lengths,
        lambda margin: -logsigmoid(margin),
    ),
    (
        "--loss.name=ipo --loss.beta=0.3",
        lambda pi, ref: 0.3 * (pi.logps - ref.logps),
        lambda margin: (margin / 0.3 - 1 / (2 * 0.3)) ** 2,
    ),
    (
        "--loss.name=simpo --loss.beta=2.5 --loss.gamma=0.7",
        lambda pi, ref: 2.5 * pi.logps / pi.lengths,
        lambda margin: -logsigmoid(margin - 0.7),
    ),
]


@pytest.mark.parametrize(("arguments", "rewards_of", "loss_of"), PREFERENCE_LOSSES)
def test_losses_and_rewards_are_means_over_the_pairs(
    both_sets, world, arguments, rewards_of, loss_of, tmp_path
):
    ref = values_of(saved_weights(world / "other"), world)

    def expected(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        rewards = rewards_of(values_of(weights, world), ref)
        margins = chosen_minus_rejected(rewards)
        return {
            "loss": loss_of(margins),
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": margins > 0,
        }

    arguments += f" --reference.path={world / 'other'}"
    require_logged(train_dpo, [*both_sets, *arguments.split()], expected, tmp_path)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo"])
def test_log_probs_are_sums_and_lengths_are_tokens_with_the_eos(both_sets, world, name, tmp_path):
    def expected(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        values = values_of(weights, world)
        return {
            "logps/chosen": values.logps[:, 0],
            "logps/rejected": values.logps[:, 1],
            "response_length/chosen": values.lengths[:, 0],
            "response_length/rejected": values.lengths[:, 1],
        }

    require_logged(train_dpo, [*both_sets, f"--loss.name={name}"], expected, tmp_path)


def test_sft_logs_the_mean_nats_per_token_of_the_chosen_response(both_sets, world, tmp_path):
    def expected(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        logps, lengths, _ = values_of(weights, world)
        chosen = {"logps/chosen": logps[:, 0], "response_length/chosen": lengths[:, 0]}
        return chosen | {"loss": -logps[:, 0] / lengths[:, 0]}

    require_logged(train_dpo, [*both_sets, "--loss.name=sft"], expected, tmp_path)


@pytest.mark.parametrize("name", ["dpo", "simpo"])
@pytest.mark.parametrize(("z", "share"), [(7.55, 0.0), (7.65, 0.2)])
def test_a_pair_is_saturated_from_a_loss_below_0_0005_on(both_sets, world, name, z, share, tmp_path):
    """-log sigma(7.55) = 0.000526 and -log sigma(7.65) = 0.000476; beta moves the largest margin there."""
    pi, ref = (values_of(saved_weights(world / model), world) for model in ("model", "other"))
    scores = pi.logps - ref.logps if name == "dpo" else pi.logps / pi.lengths  # the rewards at beta = 1
    largest = chosen_minus_rejected(scores).max().item()
    assert largest > 0
    arguments = f"--loss.name={name} --loss.beta={z / largest} --reference.path={world / 'other'}"
    arguments += " --loss.gamma=0" if name == "simpo" else ""
    before, step, *_ = run_dpo(both_sets, *arguments.split())
    assert before[f"eval/{SATURATED}"] == step[SATURATED] == pytest.approx(share)


# --- train_rm.py --------------------------------------------------------------------------------------------


def test_the_reward_models_parts_are_means_over_the_pairs(both_sets, world, tmp_path):
    """The logged margin is the difference of the rewards, without the margin that the loss demands."""

    def expected(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        logps, lengths, rewards = values_of(weights, world)
        margins = chosen_minus_rejected(rewards)
        preference, lm = -logsigmoid(margins - 0.5), -logps[:, 0] / lengths[:, 0]
        return {
            "loss": preference + 0.7 * lm + 0.3 * rewards.sum(dim=1) ** 2,
            "preference_loss": preference,
            "lm_loss": lm,
            "accuracy": margins > 0,
            "margin": margins,
            "mean_reward": rewards.mean(dim=1),
        }

    arguments = "--loss.margin=0.5 --loss.lm_weight=0.7 --loss.center_weight=0.3"
    require_logged(train_rm, [*both_sets, *arguments.split()], expected, tmp_path)


# --- both scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "margin", "accuracy"),
    [(run_dpo, "rewards/margins", "rewards/accuracies"), (run_rm, "margin", "accuracy")],
    ids=["dpo", "rm"],
)
def test_equal_rewards_are_no_success(both_sets, world, run, margin, accuracy, tmp_path):
    """A final norm of zeros gives every response the reward 0: none is preferred, and the accuracy is 0."""
    model = tmp_path / "silent"
    shutil.copytree(world / "model", model)
    weights = saved_weights(model)
    save_file(weights | {"model.norm.weight": torch.zeros(32)}, model / "model.safetensors")
    before, step, *_ = run(both_sets, f"--model.path={model}")
    assert before[f"eval/{margin}"] == step[margin] == 0.0
    assert before[f"eval/{accuracy}"] == step[accuracy] == 0.0


ONE_EPOCH_IN_THREE_STEPS = "--optim.batch_size=2 --optim.epochs=1 --optim.max_steps=0".split()


@SCRIPTS
def test_the_epoch_counts_the_pairs_drawn(five_pairs, script, tmp_path):
    script.main([*five_pairs, *ONE_EPOCH_IN_THREE_STEPS])
    assert [step["epoch"] for step in steps(metrics(tmp_path / "out"))] == pytest.approx([2 / 5, 4 / 5, 1])


@pytest.mark.parametrize(
    ("script", "arguments", "responses"),
    [(train_dpo, [], 2), (train_dpo, ["--loss.name=sft"], 1), (train_rm, [], 2)],
    ids=["dpo", "sft", "rm"],
)
def test_the_rate_counts_every_token_laid_out_once(
    five_pairs, script, arguments, responses, world, tmp_path, monkeypatch
):
    """The clock of this run stands still but for one second per step; the last line is of two steps."""
    now = 0.0

    def a_second_passes():
        nonlocal now
        now += 1.0

    for clock in ("monotonic", "perf_counter", "time"):
        monkeypatch.setattr(time, clock, lambda: now)
    arguments = [*five_pairs, *ONE_EPOCH_IN_THREE_STEPS, *arguments, "--run.log_every=3"]
    applied_gradients(script.main, arguments, after_step=a_second_passes)
    first, last = (step["tokens_per_s"] for step in steps(metrics(tmp_path / "out")))
    laid_out = sum(len(part) for pair in pair_ids(world / "model") for part in pair[: 1 + responses])
    assert first + 2 * last == pytest.approx(laid_out)


@SCRIPTS
def test_a_line_holds_the_values_of_its_own_step_however_rare_lines_are(five_pairs, script, tmp_path):
    def logged(every: int) -> list[dict]:
        out = tmp_path / f"every-{every}"
        script.main([*five_pairs, *ONE_EPOCH_IN_THREE_STEPS, f"--run.log_every={every}", f"--run.out={out}"])
        return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in steps(metrics(out))]

    first, _, third = logged(1)
    assert logged(3) == [first, third]
