"""Warnings: each when its reason is there, once, with what to try; none on a run that goes well."""

import re

import pytest

from minidpo.losses import DPO, LOSSES, BradleyTerry
from minidpo.settings import keys_of
from minidpo.training.advice import Advice
from runs import run_dpo

LARGE = 500_000_000
STEP = {"loss": 0.5, "rewards/accuracies": 0.7, "rewards/margins": 0.5, "saturated": 0.0}
EVALUATION = {"logps/chosen": -100.0, "rewards/margins": 0.0, "kl": 0.0, "sample_length": 50.0}
PERFECT = {"loss": 0.004, "rewards/accuracies": 1.0}


@pytest.fixture
def warnings(capsys):
    """The warnings on a run whose steps and evaluations differ from STEP and EVALUATION by these values."""

    def after(steps: list[dict], evaluations: list[dict], loss=None, lr=1e-6, size=LARGE, adapters=False):
        advice = Advice(loss or DPO(), size, lr, adapters)
        for values in steps:
            advice.on_line(STEP | values)
        for values in evaluations:
            advice.on_line({f"eval/{name}": value for name, value in (EVALUATION | values).items()})
        return re.findall("^warning: .*", capsys.readouterr().out, re.M)

    return after


@pytest.mark.parametrize(
    ("steps", "evaluations", "says", "tries"),
    [
        ([], [{"loss": x} for x in (0.6931, 0.7739, 0.8)], "0.7739, above the 0.6931 of step 0", "epochs"),
        ([], [{"loss": x} for x in (25.0, 20.0, 25.3)], "25.3000, above the 25.0000", "epochs"),  # IPO
        ([], [{}, {"kl": 10.4}, {"kl": 12.0}], "KL 10.4 nats", "beta"),
        ([], [{}, {"kl": 3.0, "kl_of_worst": 31.0}], "a KL of 31 nats", "read OUT/samples"),
        ([], [{}, {"logps/chosen": -111, "rewards/margins": 0.4}], "11.0 nats less likely", "beta"),
        ([PERFECT] * 4, [], "learnt by heart", "epochs"),
        ([], [{"sample_length": n} for n in (50, 55, 60, 65, 70)], "longer at every evaluation", "SimPO"),
        ([{"saturated": 0.6}, {"saturated": 0.8}], [], "60% of the pairs", "harder pairs"),
        ([], [{"ended": 0.0}, {"ended": 0.0}], "no sampled response ended", "eval.max_new_tokens"),
    ],
)
def test_warning(steps, evaluations, says, tries, warnings):
    """It is given once, with what to try."""
    (line,) = warnings(steps, evaluations)
    assert says in line and tries in line


@pytest.mark.parametrize(
    ("steps", "evaluations"),
    [
        ([{}] * 5, [{}, {"kl": 9.0, "rewards/margins": 0.5}]),
        ([], [{"loss": x} for x in (25.0, 25.2, 20.0, 22.0)]),  # at most 1 % above the start
        ([PERFECT, {}] * 3, []),  # now and then is chance
        ([], [{}, {"logps/chosen": -120.0}]),  # fallen, but margins did not rise: another trouble
        ([], [{"sample_length": n} for n in (50, 70, 60, 65, 80)]),
        ([], [{"sample_length": n} for n in (50, 51, 52, 53)]),
    ],
)
def test_no_warning(steps, evaluations, warnings):
    """A run that goes well is left alone."""
    assert warnings(steps, evaluations) == []


def test_resumed(config, tmp_path, capsys):
    """The start of a resumed run is still step 0, and what was told before is not told again."""
    arguments, file = config(optim__schedule='"constant"'), tmp_path / "out" / "metrics.jsonl"
    run_dpo(arguments, "--optim.max_steps=1")
    file.write_text(re.sub('(?<="eval/loss": )[^,]*', "0.1", file.read_text()))
    for steps, told in ((2, 1), (3, 0)):
        run_dpo(arguments, f"--optim.max_steps={steps}")
        assert capsys.readouterr().out.count("above the 0.1000 of step 0") == told


@pytest.mark.parametrize("loss", [*(kind() for kind in LOSSES.values()), BradleyTerry()], ids=repr)
def test_keys(loss, warnings):
    """A warning names no setting that the run's loss does not have."""
    steps = [PERFECT | {"accuracy": 1.0}] * 3
    evaluations = [
        {"kl": 20 * k, "logps/chosen": -20 * k, "rewards/margins": k, "sample_length": 50 + 9 * k}
        for k in range(6)
    ]
    lines = warnings(steps, evaluations, loss, lr=1e-3)
    assert len(lines) == 5
    named = set(re.findall(r"loss\.(\w+)", " ".join(lines)))
    assert named <= keys_of(loss).keys() and ("beta" in named) == loss.needs_reference


@pytest.mark.parametrize(
    ("loss", "lr", "size", "adapters", "says"),
    [
        ("dpo", 1e-6, LARGE, False, None),
        ("dpo", 2e-4, LARGE, False, "published for dpo, 5e-07 to 1e-05: expect a model that falls apart"),
        ("dpo", 1e-9, LARGE, False, "expect no change"),
        ("simpo", 2e-4, LARGE, False, "published for simpo"),
        ("dpo", 2e-4, 700_000, False, None),  # small models take more, as in the demo
        ("dpo", 5e-5, LARGE, True, None),  # Adapters take ten times the rates of full training.
        ("dpo", 2e-3, LARGE, True, "published for dpo with adapters, 5e-06 to 0.0001"),
        ("dpo", 1e-8, LARGE, True, "expect no change"),
    ],
)
def test_rate(loss, lr, size, adapters, says, warnings):
    """A rate far from the published ones is told at the start."""
    lines = warnings([], [], LOSSES[loss](), lr, size, adapters)
    assert len(lines) == bool(says) and all(f"optim.lr = {lr:g}" in line and says in line for line in lines)


@pytest.mark.parametrize(
    ("schedule", "steps", "says"),
    [("linear", 8, "lr is 0.0005 at the next step, where 0 was"), ("linear", 4, ""), ("constant", 8, "")],
)
def test_other_length(config, capsys, schedule, steps, says):
    """A run that resumes with another length says at once what that makes of its learning rate.

    After 4 of 8 steps a linear schedule is at half of 1e-3; after 4 of 4 it is at 0.
    """
    arguments = config(optim__schedule=f'"{schedule}"', optim__epochs=2)
    run_dpo(arguments, "--optim.max_steps=4", "--run.save_every=4")
    capsys.readouterr()
    run_dpo(arguments, f"--optim.max_steps={steps}")
    told = re.findall(".*were planned.*", capsys.readouterr().out)
    assert len(told) == bool(says) and all(says in line for line in told)
