"""The frontier: its estimates are what they claim, its curve is the optimum, and no work is done twice."""

import json
import math
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dpo
from minidpo.errors import UserError
from minidpo.losses import SimPO
from minidpo.tools import frontier
from minidpo.tools.demo import command as demo
from minidpo.tools.frontier_points import best_reachable, over_prompts

RUNS = [frontier.run_name(loss) for loss in frontier.QUICK.losses]


def test_standard_error_is_over_prompts():
    """Two samples of one prompt that always agree are one observation, not two."""
    once = np.array([[1.0, 2.0, 4.0, 5.0]])
    mean, error = over_prompts(once)
    assert mean == 3.0 and error == pytest.approx(math.sqrt(10 / 4) / 2)
    assert over_prompts(once.repeat(2, axis=0)) == pytest.approx((mean, error))


def test_best_reachable_closed_form():
    """Half of the responses earn 1, half 0: at tau the good have s = sigmoid(1 / tau), KL log 2 - H(s)."""
    curve = best_reachable(torch.tensor([[1.0, 0.0] * 32] * 3, dtype=torch.float64))
    for tau, kl, reward in zip(*curve.values(), strict=True):
        s = 1 / (1 + math.exp(-1 / tau))
        assert reward == pytest.approx(s)
        assert kl == pytest.approx(math.log(2) + s * math.log(s) + (1 - s) * math.log1p(-s), abs=1e-9)
    assert curve["kl"] == sorted(curve["kl"]) and curve["reward"][-1] > 0.999


def test_best_reachable_is_best():
    """No other reweighting earns more than the curve at its KL."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    curve = best_reachable(rewards)
    for _ in range(50):
        noise = torch.rand(1, generator=generator) * torch.randn(5, 64, generator=generator)
        logs = (noise + rewards).log_softmax(1)
        kl = (logs.exp() * (logs + math.log(64))).sum(1).mean().item()
        reward = (logs.exp() * rewards).sum(1).mean().item()
        above = [r for k, r in zip(curve["kl"], curve["reward"], strict=True) if k >= kl]
        assert above and reward <= above[0] + 1e-12


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """What `frontier --quick` leaves."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        frontier.main(["--quick", "--out", str(out)])
    return out


def run_here(patch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Run scripts in this process, which has loaded torch; returns the list of settings that they get."""
    ran: list[dict[str, str]] = []

    def run_script(script: str, config: str, settings: dict[str, str]) -> None:
        ran.append(settings)
        train_dpo.main(
            [str(demo.REPOSITORY / config), *(f"--{key}={value}" for key, value in settings.items())]
        )

    patch.setattr(demo, "run_script", run_script)
    patch.setattr(frontier, "run_script", run_script)
    return ran


@pytest.mark.slow
def test_figure_and_numbers(quick):
    """The command leaves a figure and a file of numbers."""
    assert (quick / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (quick / "frontier.svg").read_text()
    found = json.loads((quick / "frontier.json").read_text())
    assert list(found["runs"]) == RUNS == ["dpo-0.1", "ipo-0.2", "simpo-2-1"]
    for points in found["runs"].values():
        assert [point["step"] for point in points] == [2, 4]
        for point in points:
            assert point["kl"] > 0 and point["reward_error"] > 0 and 0 < point["length"] < 40
    assert found["reference"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_demo_judges_any_run(quick, capsys):
    """`demo --judge` has a column for every run that started from its reference."""
    runs = [str(quick / name) for name in RUNS[:2]]
    capsys.readouterr()
    demo.main(["--out", str(quick / "world"), "--judge", *runs])
    lines = capsys.readouterr().out.splitlines()
    (header,) = (line for line in lines if line.split()[:1] == ["SFT"])
    assert header.split() == ["SFT", *(name.upper() for name in RUNS[:2])]
    (kl,) = (line for line in lines if "KL from the SFT model" in line)
    sft, *others = map(float, kl.split()[-3:])
    assert sft == 0.0 and all(value > 0.0 for value in others)


@pytest.mark.slow
def test_only_the_loss_differs(quick):
    runs = [tomllib.loads((quick / name / "config.toml").read_text()) for name in RUNS]
    for key in ("lr", "batch_size", "schedule", "warmup_steps", "epochs", "beta2"):
        assert len({run["optim"][key] for run in runs}) == 1, key
    assert len({run["model"]["path"] for run in runs}) == 1
    losses = [(run["loss"]["name"], run["loss"]["beta"]) for run in runs]
    assert losses == [("dpo", 0.1), ("ipo", 0.2), ("simpo", 2.0)]


@pytest.mark.slow
def test_no_work_is_done_twice(quick, monkeypatch, capsys):
    """What is measured is not trained again; a run that is missing is, to the same points."""
    ran = run_here(monkeypatch)
    file = quick / "frontier.json"
    before = file.read_text()
    frontier.main(["--quick", "--out", str(quick)])
    assert not ran and file.read_text() == before
    table = capsys.readouterr().out
    assert all(name in table for name in ("SFT", "DPO", "IPO", "SimPO"))
    found = json.loads(before)
    lost = found["runs"].pop(RUNS[-1])
    file.write_text(json.dumps(found))
    shutil.rmtree(quick / RUNS[-1])
    frontier.main(["--quick", "--out", str(quick)])
    assert len(ran) == 1 and json.loads(file.read_text())["runs"][RUNS[-1]] == lost


@pytest.mark.slow
def test_other_reference_other_points(quick, monkeypatch):
    """Points that were measured from another reference are not kept."""
    ran = run_here(monkeypatch)
    file = quick / "frontier.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"identity": "of another reference"}))
    frontier.main(["--quick", "--out", str(quick)])
    assert len(ran) == len(RUNS) and json.loads(file.read_text()) == found


def test_run_names_differ():
    names = [frontier.run_name(loss) for loss in frontier.FULL.losses]
    assert len(set(names)) == len(names) and frontier.run_name(SimPO(beta=2.0, gamma=0.0)) == "simpo-2-0"


def test_quick_refuses_a_demo():
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="leave out --demo"):
        frontier.main(["--quick", "--demo", "runs/demo"])


def test_not_a_demo_directory(world, tmp_path):
    """A directory that the demo has not written is one line."""
    pytest.importorskip("matplotlib")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "final").symlink_to(world / "model")
    with pytest.raises(UserError, match="prompts.test.jsonl: no such file; .* the demo has written"):
        frontier.main(["--demo", str(tmp_path), "--out", str(tmp_path / "out")])


def test_without_matplotlib(monkeypatch, tmp_path):
    """One line names the extra, before anything is trained."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        frontier.main(["--quick", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
