"""Warnings: each when its reason is there, once, with what to try; none on a run that goes well."""

import pytest

from minidpo.losses import DPO, LOSSES
from minidpo.training.advice import Advice

LARGE = 500_000_000
STEP = {"loss": 0.5, "rewards/accuracies": 0.7, "rewards/margins": 0.5, "saturated": 0.0}
EVALUATION = {"logps/chosen": -100.0, "rewards/margins": 0.0, "kl": 0.0, "sample_length": 50.0}


@pytest.fixture
def given(capsys):
    def lines() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]

    return lines


def after(steps: list[dict], evaluations: list[dict], given) -> list[str]:
    advice = Advice("dpo", DPO.usual_lr, LARGE, 1e-6)
    for change in steps:
        advice.on_step(STEP | change)
    for change in evaluations:
        advice.on_evaluation(EVALUATION | change)
    return given()


@pytest.mark.parametrize(
    ("steps", "evaluations", "says", "tries"),
    [
        ([], [{}, {"kl": 10.4}, {"kl": 12.0}], "KL 10.4 nats", "beta"),
        ([], [{}, {"kl": 3.0, "kl_of_worst": 31.0}], "a KL of 31 nats", "read OUT/samples"),
        ([], [{}, {"logps/chosen": -111, "rewards/margins": 0.4}], "11.0 nats less likely", "beta"),
        ([{"loss": 0.004, "rewards/accuracies": 1.0}] * 4, [], "learnt by heart", "epochs"),
        ([], [{"sample_length": n} for n in (50, 55, 60, 65, 70)], "longer at every evaluation", "SimPO"),
        ([{"rewards/margins": 10.5}, {"rewards/margins": 12.5}], [], "mean margin of 10.5", "smoothing"),
        ([{"saturated": 0.6}, {"saturated": 0.8}], [], "60% of the pairs", "harder pairs"),
        ([], [{"ended": 0.0}, {"ended": 0.0}], "no sampled response ended", "eval.max_new_tokens"),
    ],
    ids=[
        "kl",
        "one apart",
        "chosen falls",
        "overfitted",
        "longer",
        "large margin",
        "saturated",
        "never ends",
    ],
)
def test_a_warning_is_given_once_with_what_to_try(steps, evaluations, says, tries, given):
    (line,) = after(steps, evaluations, given)
    assert says in line and tries in line


@pytest.mark.parametrize(
    ("steps", "evaluations"),
    [
        ([{}] * 5, [{}, {"kl": 9.0, "rewards/margins": 0.5}]),
        ([{"loss": 0.004, "rewards/accuracies": 1.0}, {}] * 3, []),  # now and then is chance
        ([], [{}, {"logps/chosen": -120.0}]),  # fallen, but margins did not rise: another trouble
        ([], [{"sample_length": n} for n in (50, 70, 60, 65, 80)]),
        ([], [{"sample_length": n} for n in (50, 51, 52, 53)]),
    ],
)
def test_a_run_that_goes_well_is_left_alone(steps, evaluations, given):
    assert after(steps, evaluations, given) == []


@pytest.mark.parametrize(
    ("loss", "lr", "parameters", "warned"),
    [
        ("dpo", 1e-6, LARGE, False),
        ("dpo", 2e-4, LARGE, True),
        ("dpo", 1e-9, LARGE, True),
        ("simpo", 1e-5, LARGE, False),
        ("simpo", 2e-4, LARGE, True),
        ("dpo", 2e-4, 700_000, False),  # small models take more, as in the demo
    ],
)
def test_a_rate_far_from_the_published_ones_is_told_at_the_start(loss, lr, parameters, warned, given):
    Advice(loss, LOSSES[loss].usual_lr, parameters, lr)
    assert [f"optim.lr = {lr:g}" in line for line in given()] == [True] * warned
