"""A run that ended early goes on as if it had not, and no other run goes on in its place."""

import gzip
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minidpo.errors import STOPPED, UserError
from minidpo.training import reference
from minidpo.training.run import Run
from runs import final, run_dpo, run_rm


def require_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    assert final(one).keys() == final(other).keys()
    assert all(torch.equal(weight, final(other)[name]) for name, weight in final(one).items())


@pytest.mark.parametrize(
    ("run", "keys", "after"),
    [
        (run_dpo, "--loss.name=dpo", 0),
        (run_dpo, "--loss.name=dpo", 2),
        (run_dpo, "--loss.name=dpo", 4),
        (run_dpo, "--loss.name=simpo", 2),
        (run_dpo, "--loss.name=sft", 2),
        (run_dpo, "--loss.name=kto", 2),
        (run_rm, "--loss.margin=0.5", 2),
        (run_dpo, "--eval.samples=3 --eval.max_new_tokens=6", 2),
        (run_dpo, "--lora.rank=4 --optim.lr=1e-2", 2),
        (run_rm, "--lora.rank=4 --optim.lr=1e-2", 2),
    ],
)
def test_ctrl_c(config, tmp_path, monkeypatch, capfd, run, keys, after):
    """A run of four steps saves where it is stopped, and the same command goes on from there."""
    arguments = [*config(), *keys.split()]
    at_once = run(arguments, f"--run.out={tmp_path / 'at_once'}")
    asked, real = iter(range(99)), Run.stop_requested

    def interrupted(self) -> bool:
        if next(asked) == after:  # It is asked before every step, and at the end.
            os.kill(os.getpid(), signal.SIGINT)
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Run, "stop_requested", interrupted)
        run(arguments)
    assert stop.value.code == STOPPED == 130  # what shells give Ctrl-C: `train && publish` stops too
    said = capfd.readouterr()
    assert "Ctrl-C again stops at once" in said.err
    assert (f"stopped after step {after}, saved" in said.out) == (after < 4)
    assert (tmp_path / "out" / "final").exists() == (after == 4)
    assert (tmp_path / f"out/checkpoints/step-{after}/state.json").is_file()
    resumed = run(arguments)
    require_same_weights(tmp_path / "out", tmp_path / "at_once")
    for line in (*resumed, *at_once):
        line.pop("tokens_per_s", None)
    assert resumed == at_once


@pytest.mark.parametrize("keys", [[], ["--lora.rank=4", "--optim.lr=1e-2"]], ids=["all", "adapters"])
def test_longer_run(config, tmp_path, monkeypatch, capsys, keys):
    """A run may get more steps, and needs the reference for more pairs; once done, nothing is left to do."""
    computed, real = [], reference.all_logps

    def all_logps(model, pairs, *rest):
        computed.append(len(pairs))
        return real(model, pairs, *rest)

    monkeypatch.setattr(reference, "all_logps", all_logps)
    settings = [*config(optim__batch_size=2, data__eval_pairs=4, optim__schedule='"constant"'), *keys]
    run_dpo(settings, "--optim.max_steps=3")
    assert computed == [3 * 2, 4]  # the pairs drawn, and those held out
    lines = run_dpo(settings, "--optim.max_steps=5")
    assert computed == [6, 4, 5 * 2, 4]
    shutil.rmtree(tmp_path / "out" / "final")  # as if the run had been killed before it was there
    assert run_dpo(settings, "--optim.max_steps=5") == lines
    assert computed == [6, 4, 10, 4] and "nothing left to do" in capsys.readouterr().out
    (tmp_path / "out" / "reference.safetensors").rename(tmp_path / "reference.safetensors")
    run_dpo(settings, "--optim.max_steps=4")  # It has more steps already.
    assert computed == [6, 4, 10, 4] and "nothing left to do: step 5 of 4" in capsys.readouterr().out
    (tmp_path / "reference.safetensors").rename(tmp_path / "out" / "reference.safetensors")
    run_dpo(settings, "--optim.max_steps=5", f"--run.out={tmp_path / 'at_once'}")
    longer, at_once = (load_file(tmp_path / out / "reference.safetensors") for out in ("out", "at_once"))
    for name in ("train", "held_out"):
        torch.testing.assert_close(longer[name], at_once[name], equal_nan=True)
        assert longer[name].isnan().any() == (name == "train")  # NaN: not drawn by any step
    require_same_weights(tmp_path / "out", tmp_path / "at_once")


def test_another_run(config, world, tmp_path):
    """The message names the setting that differs, even where the data that follow from it differ too. If all
    settings of [data] are the same, the files have changed."""
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(gzip.decompress((world / "pairs.jsonl.gz").read_bytes()))
    arguments = config(data__train=f'["{file}"]')
    run_dpo(arguments)
    hint = "give the run another run.out, or the old settings, files and version"
    for run, override, said in (
        (run_dpo, "loss.beta=0.2", "loss.beta = 0.1, now it is 0.2"),
        (run_dpo, "loss.name=sft", "loss.name = 'dpo', now it is 'sft'"),
        (run_rm, "loss.margin=1", "loss.name = 'dpo', now it is 'reward model'"),
        (run_dpo, "optim.lr=2e-3", "optim.lr = 0.001, now it is 0.002"),
        (run_dpo, "run.seed=1", "run.seed = 0, now it is 1"),
        (run_dpo, "run.dtype=bf16", "run.dtype = 'fp32', now it is 'bf16'"),
        (run_dpo, "data.max_length=48", "data.max_length = 64, now it is 48"),
        (run_dpo, "lora.rank=4", "lora.rank = 0, now it is 4"),
        (run_dpo, f"reference.path={world / 'other'}", "reference.path = '', now it is '"),
    ):
        with pytest.raises(UserError) as error:
            run(arguments, f"--{override}")
        where = f"{tmp_path / 'out'}/checkpoints/step-4 was made with "
        assert str(error.value).startswith(where + said) and str(error.value).endswith(f"; {hint}")
    file.write_text(file.read_text().partition("\n")[2])
    with pytest.raises(UserError, match=r"was made with other content of the files in \[data\]; give"):
        run_dpo(arguments)
