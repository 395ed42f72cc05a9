"""The gradients that the scripts hand to their optimizer, against two padded rows per pair.

Each run takes two steps on the five pairs of padded.py, cut into two or three micro-batches. Five pairs cannot
be cut into so many equal parts, so a mean of micro-batch means is not the mean over pairs. At the second step
the policy has left the weights it started from.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import train_dpo
import train_rm
from applied import Step, applied_gradients
from minidpo.losses import LOSSES
from padded import MARGINS, Values, chosen_minus_rejected, model_of, padded_values, pair_ids, saved_weights
from tiny import gradients, relative_difference


def expected_gradients(step: Step, loss, world) -> dict[str, Tensor]:
    """The gradient of the mean of loss(values), a tensor (5,), at the weights that this step began with."""
    model = model_of(step.weights)
    every = gradients(model, loss(padded_values(model, pair_ids(world / "model"))).mean())
    return {name: every[name].float() for name in step.gradients}


def require_gradients_of(loss, steps: list[Step], world) -> None:
    assert len(steps) == 2
    for step in steps:
        assert step.passes in (2, 3)
        assert relative_difference(step.gradients, expected_gradients(step, loss, world)) < 1e-4


# --- train_dpo.py: pi and ref are what policy and reference give the responses ------------------------------


def dpo(pi: Values, ref: Values) -> Tensor:
    return -logsigmoid(0.3 * chosen_minus_rejected(pi.logps - ref.logps))


def smoothed_dpo(pi: Values, ref: Values) -> Tensor:
    z = 0.3 * chosen_minus_rejected(pi.logps - ref.logps)
    return -0.8 * logsigmoid(z) - 0.2 * logsigmoid(-z)


def dpo_per_token(pi: Values, ref: Values) -> Tensor:
    return -logsigmoid(0.3 * chosen_minus_rejected((pi.logps - ref.logps) / pi.lengths))


def ipo(pi: Values, ref: Values) -> Tensor:
    return (chosen_minus_rejected(pi.logps - ref.logps) - 1 / (2 * 0.3)) ** 2


def ipo_per_token(pi: Values, ref: Values) -> Tensor:
    return (chosen_minus_rejected((pi.logps - ref.logps) / pi.lengths) - 1 / (2 * 0.3)) ** 2


def simpo(pi: Values, ref: Values) -> Tensor:
    return -logsigmoid(2.5 * chosen_minus_rejected(pi.logps / pi.lengths) - 0.7)


def smoothed_simpo(pi: Values, ref: Values) -> Tensor:
    z = 2.5 * chosen_minus_rejected(pi.logps / pi.lengths) - 0.7
    return -0.8 * logsigmoid(z) - 0.2 * logsigmoid(-z)


def sft(pi: Values, ref: Values) -> Tensor:
    return -pi.logps[:, 0] / pi.lengths[:, 0]


SIMPO = "--loss.name=simpo --loss.beta=2.5 --loss.gamma=0.7"
PREFERENCE_LOSSES = [
    (dpo, "model", "--loss.name=dpo --loss.beta=0.3"),
    (dpo, "other", "--loss.name=dpo --loss.beta=0.3"),
    (smoothed_dpo, "model", "--loss.name=dpo --loss.beta=0.3 --loss.label_smoothing=0.2"),
    (dpo_per_token, "model", "--loss.name=dpo --loss.beta=0.3 --loss.length_normalize=true"),
    (ipo, "model", "--loss.name=ipo --loss.beta=0.3"),
    (ipo, "other", "--loss.name=ipo --loss.beta=0.3"),
    (ipo_per_token, "model", "--loss.name=ipo --loss.beta=0.3 --loss.length_normalize=true"),
    (simpo, "model", SIMPO),
    (smoothed_simpo, "model", f"{SIMPO} --loss.label_smoothing=0.2"),
    (sft, "model", "--loss.name=sft"),
]


def test_every_loss_is_here():
    """A new loss gets its padded twin in PREFERENCE_LOSSES."""
    assert {arguments.split()[0].removeprefix("--loss.name=") for *_, arguments in PREFERENCE_LOSSES} == set(
        LOSSES
    )


@pytest.mark.parametrize(("loss", "reference", "arguments"), PREFERENCE_LOSSES)
def test_the_policy_gets_the_gradient_of_the_mean_loss(five_pairs, world, loss, reference, arguments):
    """The mean is over the batch's five pairs; the reference stays what it is on disk."""
    arguments += f" --reference.path={world / reference}"
    steps = applied_gradients(train_dpo.main, [*five_pairs, *arguments.split()])
    with torch.no_grad():
        ref = padded_values(model_of(saved_weights(world / reference)), pair_ids(world / "model"))
    require_gradients_of(lambda pi: loss(pi, ref), steps, world)


# --- train_rm.py --------------------------------------------------------------------------------------------


def bradley_terry(values: Values) -> Tensor:
    return -logsigmoid(chosen_minus_rejected(values.rewards))


def with_lm_loss(values: Values) -> Tensor:
    return bradley_terry(values) - 0.7 * values.logps[:, 0] / values.lengths[:, 0]


def with_margin(values: Values) -> Tensor:
    return -logsigmoid(chosen_minus_rejected(values.rewards) - 0.5)


def with_margins_of_records(values: Values) -> Tensor:
    return -logsigmoid(chosen_minus_rejected(values.rewards) - 0.5 - MARGINS)


def centred(values: Values) -> Tensor:
    return bradley_terry(values) + 0.3 * values.rewards.sum(dim=1) ** 2


def smoothed(values: Values) -> Tensor:
    z = chosen_minus_rejected(values.rewards)
    return -0.8 * logsigmoid(z) - 0.2 * logsigmoid(-z)


def all_together(values: Values) -> Tensor:
    z = chosen_minus_rejected(values.rewards) - 0.5 - MARGINS
    preference = -0.8 * logsigmoid(z) - 0.2 * logsigmoid(-z)
    return preference - 0.7 * values.logps[:, 0] / values.lengths[:, 0] + 0.3 * values.rewards.sum(dim=1) ** 2


NO_LM, LM = "--loss.lm_weight=0", "--loss.lm_weight=0.7"
OF_RECORDS = "--loss.margin=0.5 --loss.margin_from_data=true"
REWARD_LOSSES = [
    (bradley_terry, NO_LM),
    (with_lm_loss, LM),
    (with_margin, f"{NO_LM} --loss.margin=0.5"),
    (with_margins_of_records, f"{NO_LM} {OF_RECORDS}"),
    (centred, f"{NO_LM} --loss.center_weight=0.3"),
    (smoothed, f"{NO_LM} --loss.label_smoothing=0.2"),
    (all_together, f"{LM} {OF_RECORDS} --loss.center_weight=0.3 --loss.label_smoothing=0.2"),
]


@pytest.mark.parametrize(("loss", "arguments"), REWARD_LOSSES)
def test_the_reward_model_gets_the_gradient_of_the_mean_loss(five_pairs, world, loss, arguments):
    steps = applied_gradients(train_rm.main, [*five_pairs, *arguments.split()])
    require_gradients_of(loss, steps, world)


def first_step(arguments: list[str], tmp_path, name: str, *more: str) -> Step:
    return applied_gradients(train_rm.main, [*arguments, *more, f"--run.out={tmp_path / name}"])[0]


def test_the_lm_loss_trains_the_body_and_not_the_reward_head(five_pairs, tmp_path):
    without = first_step(five_pairs, tmp_path, "without", NO_LM)
    with_lm = first_step(five_pairs, tmp_path, "with", "--loss.lm_weight=1")
    change = {n: (with_lm.gradients[n] - gradient).norm() for n, gradient in without.gradients.items()}
    assert change.pop("score.weight") <= 1e-6 * without.gradients["score.weight"].norm()
    assert min(change.values()) > 1e-3
    assert with_lm.gradients["lm_head.weight"].norm() > 1e-3


def test_centring_pulls_the_sum_of_both_rewards_to_zero(five_pairs, tmp_path, world):
    """On the head w, where r = w . h, center_weight = 1 adds the gradient g = mean 2 (r_c + r_r) (h_c + h_r).

    So w . g = 2 mean (r_c + r_r)^2, which is positive: a step against g makes w . h smaller.
    """
    without = first_step(five_pairs, tmp_path, "without", NO_LM)
    centred = first_step(five_pairs, tmp_path, "centred", NO_LM, "--loss.center_weight=1")
    head = without.weights["score.weight"]
    added = centred.gradients["score.weight"] - without.gradients["score.weight"]
    with torch.no_grad():
        rewards = padded_values(model_of(without.weights), pair_ids(world / "model")).rewards
    expected = 2 * rewards.sum(dim=1).square().mean().item()
    assert (head * added).sum().item() == pytest.approx(expected, rel=1e-4) and expected > 0.1


# --- both scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "loss", "arguments"),
    [(train_dpo, lambda values: sft(values, values), "--loss.name=sft"), (train_rm, with_lm_loss, LM)],
    ids=["dpo", "rm"],
)
def test_a_short_last_batch_is_averaged_over_the_pairs_it_has(five_pairs, world, script, loss, arguments):
    """One epoch of five pairs in batches of eight is one step, and its mean is over five."""
    arguments += " --optim.batch_size=8 --optim.epochs=1"
    (step,) = applied_gradients(script.main, [*five_pairs, *arguments.split()])
    assert relative_difference(step.gradients, expected_gradients(step, loss, world)) < 1e-4


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])
def test_bf16_autocast_rounds_the_gradient_and_does_not_turn_it(five_pairs, script, tmp_path):
    def gradient(dtype: str) -> Tensor:
        arguments = [*five_pairs, f"--run.dtype={dtype}", f"--run.out={tmp_path / dtype}"]
        step = applied_gradients(script.main, arguments)[0]
        return torch.cat([gradient.flatten() for gradient in step.gradients.values()])

    exact, rounded = gradient("fp32"), gradient("bf16")
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
