"""The gradients that the scripts hand to their optimizer, against two padded rows per pair.

Each run takes two steps on the five pairs of padded.py, cut into two or three micro-batches: a mean of means
of so many parts is not the mean over pairs. At the second step the policy has left its first weights.
"""

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import train_dpo
import train_rm
from applied import Step, applied_gradients
from minidpo.data import PairOrder, TokenPair
from minidpo.losses import KTO, LOSSES, PairLogps
from minidpo.training import ReferencePoint, pair_logps
from padded import MARGINS, model_of, padded_values, pair_ids, saved_weights
from padded import chosen_minus_rejected as gap
from tiny import gradients, naive_logps, relative_difference


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


def log_odds(pi):
    """log(P / (1 - P)) of the geometric mean P of the tokens' probabilities."""
    p = (pi.logps / pi.lengths).exp()
    return (p / (1 - p)).log()


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
    DPO_ARGUMENTS + " --loss.sft_weight=0.7": lambda pi, ref: (
        -logsigmoid(0.3 * gap(pi.logps - ref.logps)) + 0.7 * sft(pi, ref)
    ),
    DPO_ARGUMENTS + " --loss.margin_from_data=true": lambda pi, ref: (
        -logsigmoid(0.3 * gap(pi.logps - ref.logps) - MARGINS)
    ),
    "orpo --loss.lambda_or=0.7": lambda pi, ref: sft(pi, ref) - 0.7 * logsigmoid(gap(log_odds(pi))),
    "robust --loss.beta=0.3": lambda pi, ref: (
        (-0.9 * logsigmoid(z := 0.3 * gap(pi.logps - ref.logps)) + 0.1 * logsigmoid(-z)) / 0.8
    ),
    "hinge --loss.beta=0.05": lambda pi, ref: torch.relu(1 - 0.05 * gap(pi.logps - ref.logps)),
    "sft": sft,
}


def of_object(loss):
    """The loss itself on padded rows: for those that have no equation above, which is proven by their claims."""
    return lambda pi, ref: loss(PairLogps(*pi.logps.T, *ref.logps.T, *pi.lengths.T))


WRITTEN_OUT = {name.split()[0] for name in PREFERENCE_LOSSES}
OTHERS = {name: loss for name, loss in LOSSES.items() if name not in WRITTEN_OUT and not loss.unpaired}
PREFERENCE_LOSSES |= {name: of_object(loss()) for name, loss in OTHERS.items()}
CASES = [(name, "model") for name in PREFERENCE_LOSSES] + [(DPO_ARGUMENTS, "other"), (IPO_ARGUMENTS, "other")]


@pytest.mark.parametrize(("name", "reference"), CASES)
def test_policy(five_pairs, world, name, reference):
    """It gets the gradient of the mean loss of five pairs; the reference stays what it is on disk."""
    arguments = f"--loss.name={name} --reference.path={world / reference}"
    steps = applied_gradients(train_dpo.main, [*five_pairs, *arguments.split()])
    assert len(steps) == 2 and all(step.passes in (2, 3) for step in steps)
    with torch.no_grad():
        ref = padded_values(model_of(saved_weights(world / reference)), pair_ids(world / "model"))
    require_gradients_of(lambda pi: PREFERENCE_LOSSES[name](pi, ref), steps, world)


# --- KTO: of five pairs the ten responses, first the chosen ones; the reference point is a mean over the batch ---


def kto_records(world) -> list[tuple]:
    """Prompt, response and label."""
    pairs = pair_ids(world / "model")
    return [(p.prompt, p.chosen, True) for p in pairs] + [(p.prompt, p.rejected, False) for p in pairs]


def require_kto(steps: list[Step], world, reference: str) -> list[float]:
    """The gradient of each step is that of KTO with beta 0.3 and lambdas 1.5, 2 over all ten records; z0s."""
    order, records, z0s = PairOrder(10, 10, 2, 2, seed=0), kto_records(world), []
    frozen = model_of(saved_weights(world / reference))
    for number, step in enumerate(steps):
        model, batch = model_of(step.weights), [records[row] for row in order[number]]
        # Each prompt with its own response, and with that of the record before.
        both = [TokenPair(batch[i][0], batch[i][1], batch[i - 1][1], i) for i in range(10)]
        log_ratios = naive_logps(model, both) - naive_logps(frozen, both).detach()
        z0s.append(log_ratios[:, 1].mean().clamp(min=0).item())
        values = [
            (1.5 if liked else 2.0) * torch.sigmoid(0.3 * (ratio - z0s[-1]) * (-1 if liked else 1))
            for ratio, (_, _, liked) in zip(log_ratios[:, 0], batch, strict=True)
        ]
        every = gradients(model, torch.stack(values).mean())
        assert relative_difference(step.gradients, {n: every[n].float() for n in step.gradients}) < 1e-4
    return z0s


def kto_steps(five_pairs, world, reference: str, *more: str) -> list[Step]:
    keys = "name=kto beta=0.3 lambda_d=1.5 lambda_u=2".split()
    arguments = [*(f"--loss.{key}" for key in keys), "--optim.batch_size=10", *more]
    return applied_gradients(
        train_dpo.main, [*five_pairs, *arguments, f"--reference.path={world / reference}"]
    )


@pytest.mark.parametrize(("reference", "micro_tokens"), [("model", 64), ("model", 1000), ("other", 64)])
def test_kto(five_pairs, world, reference, micro_tokens):
    """z0 is one number per step, whatever its micro-batches, and no gradient flows through it."""
    steps = kto_steps(five_pairs, world, reference, f"--optim.micro_tokens={micro_tokens}")
    assert len(steps) == 2 and all((step.passes > 1) == (micro_tokens == 64) for step in steps)
    z0s = require_kto(steps, world, reference)
    assert max(z0s) > 0.01  # Else it would not matter here.


def wrong_z0(form):
    """A reference point made of the log-ratios of mismatched responses, (n,)."""

    def of(self, policy, texts, reference):
        texts.ref_logps = reference
        every = range(len(texts))
        pairs = [pair_logps(policy, texts, np.array([i]), KTO(), self._run.device, "fp32") for i in every]
        return form(torch.cat([pair.chosen - pair.ref_chosen for pair in pairs]), pairs)

    return of


WRONG_Z0 = {
    "0": lambda ratios, pairs: torch.zeros(()),
    "not cut off at 0": lambda ratios, pairs: ratios.mean() - 1,
    "cut off before the mean": lambda ratios, pairs: ratios.detach().clamp(min=0).mean(),
    "of one micro-batch": lambda ratios, pairs: ratios[:3].detach().mean().clamp(min=0),
    "summed": lambda ratios, pairs: ratios.detach().sum().clamp(min=0),
    "without reference": lambda ratios, pairs: (
        torch.cat([p.chosen for p in pairs]).detach().mean().clamp(min=0)
    ),
    "with gradient": lambda ratios, pairs: ratios.mean().clamp(min=0),
}


@pytest.mark.parametrize("form", WRONG_Z0)
def test_wrong_z0(five_pairs, world, monkeypatch, form):
    """Mistakes that real projects make in the reference point show in the applied gradients."""
    monkeypatch.setattr(ReferencePoint, "_of", wrong_z0(WRONG_Z0[form]))
    steps = kto_steps(five_pairs, world, "model", "--optim.micro_tokens=1000")
    with pytest.raises(AssertionError):
        require_kto(steps, world, "model")


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


def test_bf16(five_pairs, script, tmp_path):
    """Autocast rounds the gradient and does not turn it."""

    def gradient(dtype: str) -> torch.Tensor:
        keys = [f"--run.dtype={dtype}", f"--run.out={tmp_path / dtype}"]
        step, *_ = applied_gradients(script.main, [*five_pairs, *keys])
        return torch.cat([gradient.flatten() for gradient in step.gradients.values()])

    exact, rounded = gradient("fp32"), gradient("bf16")
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.1
