"""Steps that cannot be taken: numbers that are not finite stop the run and show the batch; memory is made to do."""

import json
import os
import signal
import sys

import pytest
import torch

import train_dpo
import train_rm
from minidpo import guards, objective
from minidpo.errors import RunStopped, exit_on_user_error
from minidpo.guards import MicroTokens, stop_on_signals
from runs import final

SCRIPTS = pytest.mark.parametrize(
    ("script", "loss"), [(train_dpo, "dpo_loss"), (train_rm, "bradley_terry_loss")], ids=["dpo", "rm"]
)


@pytest.fixture
def spoilt(monkeypatch):
    """Makes one pair's loss, of the nth call of `name` in `script`, `value`."""

    def spoil(script, name: str, nth: int, value: float) -> None:
        where = objective if script is train_dpo else script
        real, calls = getattr(where, name), iter(range(1, 1000))

        def loss(*arguments):
            result = real(*arguments)
            spoils = torch.zeros_like(arguments[0])
            spoils[0] = value if next(calls) >= nth else 0.0
            return (
                result._replace(losses=result.losses + spoils)
                if hasattr(result, "losses")
                else result + spoils
            )

        monkeypatch.setattr(where, name, loss)

    return spoil


@SCRIPTS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_though_its_gradient_is(
    config, spoilt, script, loss, value, tmp_path
):
    spoilt(script, loss, 3, value)  # the third: after the evaluation and one step; it adds no gradient
    with pytest.raises(RunStopped, match=rf"step 2: loss is {value}, records \[.*\] of .*pairs.jsonl.gz"):
        script.main([*config(), "--run.save_every=1", "--optim.micro_tokens=4096"])
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-1"]


@SCRIPTS
def test_the_batch_that_stopped_a_run_is_left_for_inspection(config, spoilt, script, loss, tmp_path, world):
    spoilt(script, loss, 3, float("nan"))
    file = tmp_path / "out" / "bad_batch-step-2.json"
    with pytest.raises(RunStopped, match=str(file)) as stopped:
        script.main([*config(), "--optim.micro_tokens=4096"])
    batch = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (batch["step"], batch["loss"]) == (2, "nan")
    assert len(batch["pairs"]) == 4
    for pair in batch["pairs"]:
        assert pair["file"] == str(world / "pairs.jsonl.gz")
        assert str(pair["record"]) in str(stopped.value)
        assert pair["prompt"]["text"].startswith("\n\nHuman:")
        for role in ("prompt", "chosen", "rejected"):
            assert pair[role]["ids"] and pair[role]["text"]


def test_the_pair_at_fault_is_told_by_its_own_loss(config, monkeypatch, tmp_path):
    real = train_dpo.response_logps

    def one_is_nan(policy, packed):
        logps = real(policy, packed)
        return torch.where(packed.scored_lengths.view_as(logps)[:, :1] > 15, torch.nan, logps)

    monkeypatch.setattr(train_dpo, "response_logps", one_is_nan)
    arguments = [*config(), "--loss.name=simpo", "--data.eval_pairs=0", "--optim.max_steps=0"]
    with pytest.raises(RunStopped):
        train_dpo.main(arguments)
    (file,) = (tmp_path / "out").glob("bad_batch-*.json")
    pairs = json.loads(file.read_text())["pairs"]
    at_fault = [len(pair["chosen"]["ids"]) > 15 for pair in pairs]
    assert [pair["loss"] == "nan" for pair in pairs] == at_fault
    assert 0 < sum(at_fault) < len(pairs)


@SCRIPTS
def test_a_step_that_runs_out_of_memory_is_done_again_with_smaller_passes_and_the_same_result(
    config, monkeypatch, capsys, script, loss, tmp_path
):
    arguments = config(optim__micro_tokens=160)
    script.main([*arguments, f"--run.out={tmp_path / 'whole'}"])
    capsys.readouterr()
    real, passes = script.pack_row, iter(range(1, 1000))

    def small_memory(*arguments):
        if torch.is_grad_enabled() and next(passes) == 2:  # of step 1, whose gradients are half added up
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*arguments)

    monkeypatch.setattr(script, "pack_row", small_memory)
    script.main([*arguments, f"--run.out={tmp_path / 'small'}"])
    said = capsys.readouterr().out
    assert "step 1: out of GPU memory with 160 tokens a pass; again with 80" in said
    assert "optim.micro_tokens = 80 or run.activation_checkpointing = true" in said
    whole, small = final(tmp_path / "whole"), final(tmp_path / "small")
    for name in whole:
        torch.testing.assert_close(small[name], whole[name], rtol=1e-4, atol=1e-5)


@SCRIPTS
def test_where_no_smaller_pass_would_do_one_line_names_the_knobs(config, monkeypatch, script, loss):
    def no_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(script, "pack_row", no_memory)
    with pytest.raises(
        RunStopped,
        match=r"^step 1: out of GPU memory .*optim.micro_tokens.*run.activation_checkpointing = true",
    ):
        script.main([*config(), "--data.eval_pairs=0"])


@pytest.mark.parametrize("ranks, cut_off", [(1, True), (2, False)])
def test_a_signal_does_not_cut_off_the_error_of_one_of_several_processes(monkeypatch, capfd, ranks, cut_off):
    monkeypatch.setattr(guards, "ranks", lambda: ranks)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(RuntimeError), stop_on_signals():
            raise RuntimeError("Connection closed by peer")
        assert (signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]) == cut_off
        if not cut_off:
            os.kill(os.getpid(), signal.SIGTERM)
            assert capfd.readouterr().err == ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_passes_are_halved_down_to_the_longest_pair_and_stay_small():
    room, seen = MicroTokens(64, least=20), []

    def work() -> int:
        seen.append(room.tokens)
        if room.tokens > 20:
            raise torch.OutOfMemoryError
        return room.tokens

    assert room.fit(1, work) == 20 and seen == [64, 32, 20]
    assert room.fit(2, work) == 20, "what was too much once is not tried again"


def test_memory_that_runs_out_elsewhere_is_one_line_and_another_error_keeps_its_traceback(
    monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["script"])

    def raising(error: Exception):
        def main(arguments: list[str]) -> None:
            raise error

        return main

    with pytest.raises(SystemExit) as left:
        exit_on_user_error(raising(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nMore.")))
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.count("\n") == 1
    assert "optim.micro_tokens" in said and "run.activation_checkpointing" in said
    with pytest.raises(RuntimeError, match="a bug"):
        exit_on_user_error(raising(RuntimeError("a bug")))
