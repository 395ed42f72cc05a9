"""What metrics.jsonl says of a step or an evaluation, against two padded rows per pair.

The five pairs of padded.py are trained on and held out at once, so a line of training and the evaluation
before it are of the same pairs under the same weights.
"""

import time

import pytest
import torch
from torch.nn.functional import logsigmoid

import train_dpo
import train_rm
from applied import applied_gradients
from padded import PAIRS, Values, model_of, padded_values, pair_ids, saved_weights, write_pairs
from runs import metrics, run_dpo, steps


@pytest.fixture
def both_sets(five_pairs, tmp_path) -> list[str]:
    """Two steps on the five pairs, which are held out too (last first), with evaluations before and after."""
    held_out = write_pairs(tmp_path / "held_out.jsonl", reversed(PAIRS))
    return [*five_pairs, f"--data.eval={held_out}", "--run.eval_every=1"]


@torch.no_grad()
def values_of(weights: dict, world) -> Values:
    return padded_values(model_of(weights), pair_ids(world / "model"))


def require_means(main, arguments: list[str], expected, world, out) -> None:
    """expected(pi) holds what is to be logged per pair, (5,) each: means, under the weights before the step."""
    first, second = (step.weights for step in applied_gradients(main, arguments))
    before, step_1, between, step_2, _ = metrics(out)
    for weights, evaluation, step in ((first, before, step_1), (second, between, step_2)):
        for name, values in expected(values_of(weights, world)).items():
            mean = pytest.approx(values.double().mean().item(), rel=1e-4, abs=1e-5)
            assert step[name] == mean and evaluation[f"eval/{name}"] == mean, name


def test_dpo(both_sets, world, tmp_path):
    """Losses, rewards, summed log-probs, and lengths in tokens with the EOS. What other losses make of these is
    proven by their claims (minidpo/verify)."""
    ref = values_of(saved_weights(world / "other"), world)

    def expected(pi: Values) -> dict:
        rewards = 0.3 * (pi.logps - ref.logps)
        margins = rewards[:, 0] - rewards[:, 1]
        values = {"loss": -logsigmoid(margins), "rewards/margins": margins, "rewards/accuracies": margins > 0}
        for name, both in (("rewards", rewards), ("logps", pi.logps), ("response_length", pi.lengths)):
            values |= {f"{name}/chosen": both[:, 0], f"{name}/rejected": both[:, 1]}
        return values

    keys = ["--loss.beta=0.3", f"--reference.path={world / 'other'}"]
    require_means(train_dpo.main, [*both_sets, *keys], expected, world, tmp_path / "out")


def test_sft(both_sets, world, tmp_path):
    """The loss is the mean nats per token of the chosen response."""

    def expected(pi: Values) -> dict:
        chosen, length = pi.logps[:, 0], pi.lengths[:, 0]
        return {"loss": -chosen / length, "logps/chosen": chosen, "response_length/chosen": length}

    require_means(train_dpo.main, [*both_sets, "--loss.name=sft"], expected, world, tmp_path / "out")


def test_reward_model(both_sets, world, tmp_path):
    """The logged margin is that of the rewards, without the 0.5 that the loss demands."""

    def expected(pi: Values) -> dict:
        margins = pi.rewards[:, 0] - pi.rewards[:, 1]
        preference, lm = -logsigmoid(margins - 0.5), -pi.logps[:, 0] / pi.lengths[:, 0]
        loss = preference + 0.7 * lm + 0.3 * pi.rewards.sum(dim=1) ** 2
        values = {"loss": loss, "preference_loss": preference, "lm_loss": lm, "accuracy": margins > 0}
        return values | {"margin": margins, "mean_reward": pi.rewards.mean(dim=1)}

    keys = ["--loss.margin=0.5", "--loss.lm_weight=0.7", "--loss.center_weight=0.3"]
    require_means(train_rm.main, [*both_sets, *keys], expected, world, tmp_path / "out")


@pytest.mark.parametrize(("z", "share"), [(7.55, 0.0), (7.65, 0.2)])
def test_saturated(both_sets, world, z, share):
    """A pair counts below a loss of 0.0005: -log sigma(7.55) = 0.000526 and -log sigma(7.65) = 0.000476."""
    pi, ref = (values_of(saved_weights(world / model), world) for model in ("model", "other"))
    ratios = pi.logps - ref.logps
    beta = z / (ratios[:, 0] - ratios[:, 1]).max().item()  # One of the five pairs gets this z.
    before, step, *_ = run_dpo(both_sets, f"--loss.beta={beta}", f"--reference.path={world / 'other'}")
    assert before["eval/saturated"] == step["saturated"] == pytest.approx(share)


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
