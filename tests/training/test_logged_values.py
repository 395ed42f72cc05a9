"""What metrics.jsonl says of a step or an evaluation, against two padded rows per pair.

The five pairs of padded.py are trained on, and all but the first are held out at once, so a line of training
and the evaluation before it are of known pairs under the same weights.
"""

import time

import pytest
import torch

import train_dpo
import train_rm
from applied import applied_gradients
from minidpo.losses import DPO, SFT, BradleyTerry, PairLogps, Rewards
from minidpo.settings import keys_of, toml
from padded import PAIRS, Values, model_of, padded_values, pair_ids, saved_weights, write_pairs
from runs import metrics, steps


@pytest.fixture
def both_sets(five_pairs, tmp_path) -> list[str]:
    """Two steps on the five pairs, with evaluations before and after on the last four (last first)."""
    held_out = write_pairs(tmp_path / "held_out.jsonl", reversed(PAIRS[1:]))
    return [*five_pairs, f"--data.eval={held_out}", "--run.eval_every=1"]


@torch.no_grad()
def values_of(weights: dict, world) -> Values:
    return padded_values(model_of(weights), pair_ids(world / "model"))


LM = dict(margin=0.5, lm_weight=0.7, center_weight=0.3)


@pytest.mark.parametrize(
    ("script", "loss"),
    [
        (train_dpo, DPO(beta=0.3)),
        (train_dpo, SFT()),
        (train_rm, BradleyTerry(**LM)),
        (train_rm, BradleyTerry(lm_weight=0)),
    ],
    ids=["dpo", "sft", "rm", "rm without lm"],
)
def test_means(both_sets, world, tmp_path, script, loss):
    """What the loss makes of its pairs (tests/losses/test_metrics.py) is logged as means over all five, or all
    that are held out, under the weights before the step, with no other names."""
    ref = values_of(saved_weights(world / "other"), world)
    keys = [f"--loss.{name}={toml(getattr(loss, name))}" for name in keys_of(loss)]
    keys += [] if script is train_rm else [f"--loss.name={loss.name}", f"--reference.path={world / 'other'}"]
    first, second = (step.weights for step in applied_gradients(script.main, [*both_sets, *keys]))
    before, step_1, between, step_2, _ = metrics(tmp_path / "out")
    for weights, evaluation, step in ((first, before, step_1), (second, between, step_2)):
        pi = values_of(weights, world)
        if script is train_rm:
            read = Rewards(*pi.rewards.T, None, pi.logps[:, 0], pi.lengths[:, 0])
        else:
            read = PairLogps(*pi.logps.T, *ref.logps.T, *pi.lengths.T)
        values = loss.metrics(read, loss(read))
        means = {name: value.double().mean().item() for name, value in values.items()}
        of_held_out = {f"eval/{name}": value[1:].double().mean().item() for name, value in values.items()}
        assert {name: step[name] for name in means} == pytest.approx(means, rel=1e-4, abs=1e-5)
        assert evaluation == pytest.approx({"step": evaluation["step"]} | of_held_out, rel=1e-4, abs=1e-5)
        assert step.keys() == means.keys() | {"step", "epoch", "lr", "grad_norm", "tokens_per_s"}


ONE_EPOCH_IN_THREE_STEPS = ["--optim.batch_size=2", "--optim.epochs=1", "--optim.max_steps=0"]


@pytest.mark.parametrize(
    ("script", "loss", "responses"),
    [(train_dpo, "beta=0.1", 2), (train_dpo, "name=sft", 1), (train_rm, "margin=0", 2)],
)
def test_tokens_per_s(five_pairs, world, tmp_path, monkeypatch, script, loss, responses):
    """Every token laid out counts once. The clock stands still but for one second per step."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    keys = [*ONE_EPOCH_IN_THREE_STEPS, f"--loss.{loss}", "--run.log_every=3"]
    applied_gradients(script.main, [*five_pairs, *keys], after_step=lambda: now.append(now.pop() + 1))
    first, of_two_steps = (step["tokens_per_s"] for step in steps(metrics(tmp_path / "out")))
    laid_out = sum(len(part) for pair in pair_ids(world / "model") for part in pair[: 1 + responses])
    assert first + 2 * of_two_steps == pytest.approx(laid_out)


def test_rare_lines(five_pairs, script, tmp_path):
    """However rare lines are, each holds the values of its own step, such as the share of pairs drawn."""

    def logged(every: int) -> list[dict]:
        out = tmp_path / f"every-{every}"
        script.main([*five_pairs, *ONE_EPOCH_IN_THREE_STEPS, f"--run.log_every={every}", f"--run.out={out}"])
        return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in steps(metrics(out))]

    first, second, third = logged(1)
    assert [line["epoch"] for line in (first, second, third)] == pytest.approx([2 / 5, 4 / 5, 1])
    assert logged(3) == [first, third]
