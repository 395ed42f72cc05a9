"""The gradients that the scripts hand to their optimizer, against two padded rows per pair.

Each run takes two steps on the five pairs of padded.py, cut into two or three micro-batches: a mean of means
of so many parts is not the mean over pairs. At the second step the policy has left its first weights.
"""

import pytest
import torch
from torch.nn.functional import logsigmoid

import train_dpo
import train_rm
from applied import Step, applied_gradients
from minidpo.losses import LOSSES
from padded import MARGINS, model_of, padded_values, pair_ids, saved_weights
from padded import chosen_minus_rejected as gap
from tiny import gradients, relative_difference


def require_gradients_of(loss, steps: list[Step], world) -> None:
    """The gradient at each step is that of the mean of loss(values), (5,), at the weights it began with."""
    for step in steps:
        model = model_of(step.weights)
        every = gradients(model, loss(padded_values(model, pair_ids(world / "model"))).mean())
        expected = {name: every[name].float() for name in step.gradients}
        assert relative_difference(step.gradients, expected) < 1e-4


def smoothed(z):
    return -0.8 * logsigmoid(z) - 0.2 * logsigmoid(-z)


def sft(pi, ref):
    return -pi.logps[:, 0] / pi.lengths[:, 0]


# --- train_dpo.py: pi and ref are what policy and reference give the responses ------------------------------

DPO_ARGUMENTS, IPO_ARGUMENTS = "dpo --loss.beta=0.3", "ipo --loss.beta=0.3"
SIMPO_ARGUMENTS = "simpo --loss.beta=2.5 --loss.gamma=0.7"
SMOOTHED, PER_TOKEN = " --loss.label_smoothing=0.2", " --loss.length_normalize=true"
PREFERENCE_LOSSES = {
    DPO_ARGUMENTS: lambda pi, ref: -logsigmoid(0.3 * gap(pi.logps - ref.logps)),
    DPO_ARGUMENTS + SMOOTHED: lambda pi, ref: smoothed(0.3 * gap(pi.logps - ref.logps)),
    DPO_ARGUMENTS + PER_TOKEN: lambda pi, ref: -logsigmoid(0.3 * gap((pi.logps - ref.logps) / pi.lengths)),
    IPO_ARGUMENTS: lambda pi, ref: (gap(pi.logps - ref.logps) - 1 / (2 * 0.3)) ** 2,
    IPO_ARGUMENTS + PER_TOKEN: lambda pi, ref: (
        (gap((pi.logps - ref.logps) / pi.lengths) - 1 / (2 * 0.3)) ** 2
    ),
    SIMPO_ARGUMENTS: lambda pi, ref: -logsigmoid(2.5 * gap(pi.logps / pi.lengths) - 0.7),
    SIMPO_ARGUMENTS + SMOOTHED: lambda pi, ref: smoothed(2.5 * gap(pi.logps / pi.lengths) - 0.7),
    "sft": sft,
}
CASES = [(name, "model") for name in PREFERENCE_LOSSES] + [(DPO_ARGUMENTS, "other"), (IPO_ARGUMENTS, "other")]


def test_every_loss():
    """A new loss gets its padded twin in PREFERENCE_LOSSES."""
    assert {name.split()[0] for name in PREFERENCE_LOSSES} == set(LOSSES)


@pytest.mark.parametrize(("name", "reference"), CASES)
def test_policy(five_pairs, world, name, reference):
    """It gets the gradient of the mean loss of five pairs; the reference stays what it is on disk."""
    arguments = f"--loss.name={name} --reference.path={world / reference}"
    steps = applied_gradients(train_dpo.main, [*five_pairs, *arguments.split()])
    assert len(steps) == 2 and all(step.passes in (2, 3) for step in steps)
    with torch.no_grad():
        ref = padded_values(model_of(saved_weights(world / reference)), pair_ids(world / "model"))
    require_gradients_of(lambda pi: PREFERENCE_LOSSES[name](pi, ref), steps, world)


# --- train_rm.py --------------------------------------------------------------------------------------------

NO_LM, LM, CENTRED = "--loss.lm_weight=0", "--loss.lm_weight=0.7", " --loss.center_weight=0.3"
MARGIN, OF_RECORDS = " --loss.margin=0.5", " --loss.margin=0.5 --loss.margin_from_data=true"


def with_lm(values):
    return -logsigmoid(gap(values.rewards)) + 0.7 * sft(values, None)


REWARD_LOSSES = {
    NO_LM: lambda values: -logsigmoid(gap(values.rewards)),
    LM: with_lm,
    NO_LM + MARGIN: lambda values: -logsigmoid(gap(values.rewards) - 0.5),
    NO_LM + OF_RECORDS: lambda values: -logsigmoid(gap(values.rewards) - 0.5 - MARGINS),
    NO_LM + CENTRED: lambda values: -logsigmoid(gap(values.rewards)) + 0.3 * values.rewards.sum(dim=1) ** 2,
    NO_LM + SMOOTHED: lambda values: smoothed(gap(values.rewards)),
    LM + OF_RECORDS + CENTRED + SMOOTHED: lambda values: (
        smoothed(gap(values.rewards) - 0.5 - MARGINS)
        + 0.7 * sft(values, None)
        + 0.3 * values.rewards.sum(dim=1) ** 2
    ),
}


@pytest.mark.parametrize("arguments", REWARD_LOSSES)
def test_reward_model(five_pairs, world, arguments):
    """It gets the gradient of the mean loss of five pairs."""
    steps = applied_gradients(train_rm.main, [*five_pairs, *arguments.split()])
    assert len(steps) == 2 and all(step.passes in (2, 3) for step in steps)
    require_gradients_of(REWARD_LOSSES[arguments], steps, world)


def first_step(script, arguments: list[str], tmp_path, *more: str) -> Step:
    return applied_gradients(script.main, [*arguments, *more, f"--run.out={tmp_path / ''.join(more)}"])[0]


def test_lm_weight(five_pairs, tmp_path):
    """Language modelling trains the body and not the reward head."""
    without = first_step(train_rm, five_pairs, tmp_path, NO_LM)
    with_lm = first_step(train_rm, five_pairs, tmp_path, "--loss.lm_weight=1")
    change = {n: (with_lm.gradients[n] - gradient).norm() for n, gradient in without.gradients.items()}
    assert change.pop("score.weight") <= 1e-6 * without.gradients["score.weight"].norm()
    assert min(change.values()) > 1e-3
    assert with_lm.gradients["lm_head.weight"].norm() > 1e-3


# --- both scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "loss"),
    [(train_dpo, "--loss.name=sft", lambda values: sft(values, None)), (train_rm, LM, with_lm)],
    ids=["dpo", "rm"],
)
def test_short_batch(five_pairs, world, script, arguments, loss):
    """One epoch of five pairs in batches of eight is one step, and its mean is over five."""
    arguments += " --optim.batch_size=8 --optim.epochs=1"
    steps = applied_gradients(script.main, [*five_pairs, *arguments.split()])
    assert len(steps) == 1
    require_gradients_of(loss, steps, world)


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=["dpo", "rm"])
def test_bf16(five_pairs, script, tmp_path):
    """Autocast rounds the gradient and does not turn it."""
    exact, rounded = (
        torch.cat([gradient.flatten() for gradient in step.gradients.values()])
        for step in (first_step(script, five_pairs, tmp_path, f"--run.dtype={d}") for d in ("fp32", "bf16"))
    )
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
