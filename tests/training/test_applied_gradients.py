"""The gradients that the scripts hand to their optimizer, against two padded rows per pair.

Each run takes two steps on the five pairs of padded.py, cut into two or three micro-batches of unequal
size, so the mean of their means is not the mean over pairs. At the second step the policy has new weights.
"""

import numpy as np
import pytest
import torch

import train_dpo
import train_rm
from applied import Step, applied_gradients
from minidpo.data import PairOrder, TokenPair
from minidpo.losses import LOSSES, SFT, BradleyTerry, PairLogps, Rewards
from padded import MARGINS, Values, model_of, padded_values, pair_ids, saved_weights, write_pairs
from runs import final, metrics
from tiny import gradients, naive_logps, relative_difference


def require_gradients_of(loss, steps: list[Step], world) -> None:
    """The gradient at each step is that of the mean of loss(values), (5,), at the weights it began with."""
    for step in steps:
        model = model_of(step.weights)
        every = gradients(model, loss(padded_values(model, pair_ids(world / "model"))).mean())
        expected = {name: every[name].float() for name in step.gradients}
        assert relative_difference(step.gradients, expected) < 1e-4


def as_arguments(settings: dict) -> list[str]:
    return [f"--loss.{name}={str(value).lower()}" for name, value in settings.items()]


# --- train_dpo.py. That each loss is its equation is proven in tests/losses/ ------------------------------------

BETA = dict(beta=0.3)
# With its own beta, the hinge loss has no gradient left at the second step.
CASES = [(name, {}, "model") for name, loss in LOSSES.items() if not loss.unpaired and name != "hinge"]
PER_TOKEN = BETA | dict(length_normalize=True)
CASES += [(name, settings, "other") for name in ("dpo", "ipo") for settings in (BETA, PER_TOKEN)]
CASES += [
    ("dpo", BETA | dict(sft_weight=0.7), "model"),
    ("dpo", BETA | dict(margin_from_data=True), "model"),
    ("simpo", dict(beta=2.5, gamma=0.7, label_smoothing=0.2), "model"),
    ("hinge", dict(beta=0.05), "model"),
]


@pytest.mark.parametrize(("name", "settings", "reference"), CASES)
def test_policy(five_pairs, world, name, settings, reference):
    """It gets the gradient of the mean loss of five pairs; the reference stays what it is on disk."""
    arguments = [f"--loss.name={name}", *as_arguments(settings), f"--reference.path={world / reference}"]
    steps = applied_gradients(train_dpo.main, [*five_pairs, *arguments])
    assert len(steps) == 2 and all(step.passes in (2, 3) for step in steps)
    with torch.no_grad():
        ref = padded_values(model_of(saved_weights(world / reference)), pair_ids(world / "model"))
    loss = LOSSES[name](**settings)
    require_gradients_of(
        lambda pi: loss(PairLogps(*pi.logps.T, *ref.logps.T, *pi.lengths.T, margin=MARGINS)), steps, world
    )


# --- KTO: of five pairs the ten responses, first the chosen ones; the reference point is a mean over the batch ---


@pytest.mark.parametrize(("reference", "micro_tokens"), [("model", 64), ("model", 1000), ("other", 64)])
def test_kto(five_pairs, world, tmp_path, reference, micro_tokens):
    """z0 is one number per step, whatever its micro-batches, and no gradient flows through it. Held-out records
    are one batch, in an order drawn from the seed."""
    keys = "--loss.name=kto --loss.beta=0.3 --loss.lambda_d=1.5 --loss.lambda_u=2".split()
    keys += [
        "--optim.batch_size=10",
        f"--optim.micro_tokens={micro_tokens}",
        f"--reference.path={world / reference}",
        f"--data.eval={write_pairs(tmp_path / 'held_out.jsonl')}",
    ]
    steps = applied_gradients(train_dpo.main, [*five_pairs, *keys])
    assert len(steps) == 2 and all((step.passes > 1) == (micro_tokens == 64) for step in steps)

    pairs, z0 = pair_ids(world / "model"), torch.zeros(())
    records = [(p.prompt, p.chosen, True) for p in pairs] + [(p.prompt, p.rejected, False) for p in pairs]
    order, frozen = PairOrder(10, 10, 2, 2, seed=0), model_of(saved_weights(world / reference))

    def log_ratios_of(model, batch):
        """(10, 2): of each prompt with its own response, and with that of the record before."""
        both = [TokenPair(batch[i][0], batch[i][1], batch[i - 1][1], i) for i in range(10)]
        return naive_logps(model, both) - naive_logps(frozen, both).detach()

    for number, step in enumerate(steps):
        model, batch = model_of(step.weights), [records[row] for row in order[number]]
        log_ratios = log_ratios_of(model, batch)
        z0 = log_ratios[:, 1].mean().clamp(min=0).detach()
        values = [
            (1.5 if liked else 2.0) * torch.sigmoid(0.3 * (ratio - z0) * (-1 if liked else 1))
            for ratio, (_, _, liked) in zip(log_ratios[:, 0], batch, strict=True)
        ]
        every = gradients(model, torch.stack(values).mean())
        assert relative_difference(step.gradients, {n: every[n].float() for n in step.gradients}) < 1e-4
    assert z0 > 0.01  # Else it would not matter here.
    held_out = [records[row] for row in np.random.default_rng(0).permutation(10)]
    z0 = log_ratios_of(model_of(final(tmp_path / "out")), held_out)[:, 1].mean().item()
    assert metrics(tmp_path / "out")[-1]["eval/z0"] == pytest.approx(z0, rel=1e-4) and z0 > 0.01


# --- train_rm.py --------------------------------------------------------------------------------------------


def rewards_loss(settings: dict):
    def loss(values: Values):
        return BradleyTerry(**settings)(
            Rewards(*values.rewards.T, MARGINS, values.logps[:, 0], values.lengths[:, 0])
        )

    return loss


EVERY = dict(margin=0.5, margin_from_data=True, lm_weight=0.7, center_weight=0.3, label_smoothing=0.2)


@pytest.mark.parametrize("settings", [dict(lm_weight=0), dict(lm_weight=0.7), EVERY])
def test_reward_model(five_pairs, world, settings):
    """It gets the gradient of the mean loss of five pairs."""
    steps = applied_gradients(train_rm.main, [*five_pairs, *as_arguments(settings)])
    assert len(steps) == 2 and all(step.passes in (2, 3) for step in steps)
    require_gradients_of(rewards_loss(settings), steps, world)


# --- both scripts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "key", "loss"),
    [
        (train_dpo, "name=sft", lambda v: SFT()(PairLogps(v.logps[:, 0], chosen_length=v.lengths[:, 0]))),
        (train_rm, "lm_weight=0.7", rewards_loss(dict(lm_weight=0.7))),
    ],
    ids=["dpo", "rm"],
)
def test_short_batch(five_pairs, world, script, key, loss):
    """One epoch of five pairs in batches of eight is one step, and its mean is over five."""
    keys = [f"--loss.{key}", "--optim.batch_size=8", "--optim.epochs=1"]
    steps = applied_gradients(script.main, [*five_pairs, *keys])
    assert len(steps) == 1
    require_gradients_of(loss, steps, world)


def test_bf16(five_pairs, script, tmp_path):
    """Under autocast the gradient differs by rounding only: by less than 10 % of its norm."""

    def gradient(dtype: str) -> torch.Tensor:
        keys = [f"--run.dtype={dtype}", f"--run.out={tmp_path / dtype}"]
        step, *_ = applied_gradients(script.main, [*five_pairs, *keys])
        return torch.cat([gradient.flatten() for gradient in step.gradients.values()])

    exact, rounded = gradient("fp32"), gradient("bf16")
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
