"""The frontier: its estimates are what they claim, its curve is the optimum, and what is done is not done again."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minidpo.commands import demo, frontier
from minidpo.commands.frontier_judge import Setting, best_reachable, over_prompts
from minidpo.errors import UserError


def test_the_standard_error_is_over_prompts():
    """Two samples of one prompt that always agree are one observation, not two."""
    once = np.array([[1.0, 2.0, 4.0, 5.0]])
    mean, error = over_prompts(once)
    assert mean == 3.0 and error == pytest.approx(math.sqrt(10 / 4) / 2)
    assert over_prompts(once.repeat(2, axis=0)) == pytest.approx((mean, error))


def test_the_best_reachable_curve_is_the_optimum_known_in_closed_form():
    """Half of the answers earn 1, half 0: at tau the good ones have s = sigmoid(1 / tau), KL = log 2 - H(s)."""
    curve = best_reachable(torch.tensor([[1.0, 0.0] * 32] * 3, dtype=torch.float64))
    for tau, kl, reward in zip(*curve.values(), strict=True):
        s = 1 / (1 + math.exp(-1 / tau))
        assert reward == pytest.approx(s)
        assert kl == pytest.approx(math.log(2) + s * math.log(s) + (1 - s) * math.log1p(-s), abs=1e-9)
    assert curve["kl"] == sorted(curve["kl"]) and curve["reward"][-1] > 0.999


def test_no_reweighting_earns_more_than_the_curve_at_its_kl():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    curve = best_reachable(rewards)
    for _ in range(50):
        logs = (
            torch.rand(1, generator=generator) * torch.randn(5, 64, generator=generator) + rewards
        ).double()
        logs = logs.log_softmax(1)
        kl = (logs.exp() * (logs + math.log(64))).sum(1).mean().item()
        reward = (logs.exp() * rewards).sum(1).mean().item()
        above = [r for k, r in zip(curve["kl"], curve["reward"], strict=True) if k >= kl]
        assert above and reward <= above[0] + 1e-12


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """What `frontier --quick` leaves; the scripts run in this process, where torch is loaded already."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        frontier.main(["--quick", "--out", str(out)])
    return out


def run_here(patch: pytest.MonkeyPatch) -> list[list[str]]:
    """Scripts in this process instead of another; returns the list that the commands will be put on."""
    import train_dpo

    commands: list[list[str]] = []

    def run_script(script: str, config: str, settings: dict[str, str]) -> None:
        commands.append([f"--{key}={value}" for key, value in settings.items()])
        train_dpo.main([str(demo.ROOT / config), *commands[-1]])

    patch.setattr(demo, "run_script", run_script)
    patch.setattr(frontier, "run_script", run_script)
    return commands


@pytest.mark.slow
def test_the_command_leaves_figure_and_numbers(quick):
    assert (quick / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (quick / "frontier.svg").read_text()
    found = json.loads((quick / "frontier.json").read_text())
    assert [run["loss"] for run in found["runs"]] == ["dpo", "ipo", "simpo"]
    for run in found["runs"]:
        assert [point["step"] for point in run["points"]] == [2, 4]
        for point in run["points"]:
            assert point["kl"] > 0 and point["reward_error"] > 0 and 0 < point["length"] < 40
    assert found["reference"]["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_the_demo_judges_any_run_from_its_reference(quick, capsys):
    runs = [str(quick / setting.name) for setting in frontier.QUICK.settings[:2]]
    capsys.readouterr()
    demo.main(["--out", str(quick / "world"), "--judge", *runs])
    lines = capsys.readouterr().out.splitlines()
    (header,) = (line for line in lines if line.split()[:1] == ["SFT"])
    assert header.split() == ["SFT", *(setting.name.upper() for setting in frontier.QUICK.settings[:2])]
    (kl,) = (line for line in lines if "KL from the SFT model" in line)
    sft, *others = map(float, kl.split()[-3:])
    assert sft == 0.0 and all(value > 0.0 for value in others)


def test_all_runs_differ_in_nothing_but_the_loss(quick):
    import tomllib

    runs = [tomllib.loads((quick / s.name / "config.toml").read_text()) for s in frontier.QUICK.settings]
    for key in ("lr", "batch_size", "schedule", "warmup_steps", "epochs", "beta2"):
        assert len({run["optim"][key] for run in runs}) == 1, key
    assert len({run["model"]["path"] for run in runs}) == 1
    assert [(run["loss"]["name"], run["loss"]["beta"]) for run in runs] == [
        ("dpo", 0.1),
        ("ipo", 0.2),
        ("simpo", 2.0),
    ]


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_what_is_missing_is(quick, monkeypatch, capsys):
    commands = run_here(monkeypatch)
    before = (quick / "frontier.json").read_text()
    frontier.main(["--quick", "--out", str(quick)])
    assert not commands and (quick / "frontier.json").read_text() == before
    table = capsys.readouterr().out
    assert all(name in table for name in ("SFT", "DPO", "IPO", "SimPO"))
    # Killed before its points were written: the checkpoints are there, nothing is trained.
    points = quick / "ipo-0.2" / "points.json"
    points.unlink()
    with pytest.raises(UserError, match="ipo-0.2: its early checkpoints are gone; delete it"):
        frontier.main(["--quick", "--out", str(quick)])
    shutil.rmtree(quick / "ipo-0.2")
    frontier.main(["--quick", "--out", str(quick)])
    assert (quick / "frontier.json").read_text() == before
    assert "tokens kept" in capsys.readouterr().out and len(commands) == 2


def test_points_of_another_reference_are_not_taken_up(tmp_path):
    file = tmp_path / "points.json"
    assert frontier.cached(file, {"reference": "a"}, lambda: [1]) == [1]
    assert frontier.cached(file, {"reference": "a"}, lambda: [2]) == [1]
    assert frontier.cached(file, {"reference": "b"}, lambda: [3]) == [3]


def test_settings_have_names_of_their_own():
    names = [setting.name for setting in frontier.FULL.settings]
    assert len(set(names)) == len(names) and Setting("simpo", 2.0, 0.0).name == "simpo-2-0"


def test_a_demo_given_to_a_quick_frontier_is_refused():
    with pytest.raises(UserError, match="leave out --demo"):
        frontier.main(["--quick", "--demo", "runs/demo"])


def test_a_demo_directory_that_is_none_is_one_line(world, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "final").symlink_to(world / "model")
    with pytest.raises(UserError, match="prompts.test.jsonl: no such file; .* the demo has written"):
        frontier.main(["--demo", str(tmp_path), "--out", str(tmp_path / "out")])


def test_without_matplotlib_one_line_names_the_extra_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        frontier.main(["--quick", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
