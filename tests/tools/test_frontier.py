"""The frontier: its estimates are what they claim, its curve is the optimum, and no work is done twice."""

import json
import math
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import train_dpo
from minidpo.tools import frontier
from minidpo.tools.demo import command as demo
from minidpo.tools.demo.samples import best_reachable, measure

RUNS = [frontier.run_name(loss) for loss in frontier.QUICK.losses]


@pytest.mark.parametrize("samples", [1, 2])
def test_standard_error(samples):
    """Two samples of one prompt that always agree are one observation, not two."""
    judged = [SimpleNamespace(reward=reward, length=3) for reward in (1.0, 2.0, 4.0, 5.0)]
    drawn = SimpleNamespace(judgements=judged)
    unseen: Any = SimpleNamespace(sample=lambda model, seed: drawn, kl=lambda model, one: np.ones(4))
    point = measure(unseen, None, 7, samples)
    # Step, reward, its error, KL, its error, length. The variance of the rewards is (4 + 1 + 1 + 4) / 3, that
    # of their mean a quarter of it.
    assert point == pytest.approx((7, 3.0, math.sqrt(10 / 3 / 4), 1.0, 0.0, 3.0))


def test_best_reachable():
    """Half of the responses earn 1, half 0: at tau the good have s = sigmoid(1 / tau), KL log 2 - H(s)."""
    good, bad = (SimpleNamespace(judgements=[SimpleNamespace(reward=reward)] * 3) for reward in (1.0, 0.0))
    curve = best_reachable([good, bad] * 32)
    for tau, kl, reward in zip(*curve.values(), strict=True):
        s = 1 / (1 + math.exp(-1 / tau))
        assert reward == pytest.approx(s)
        assert kl == pytest.approx(math.log(2) + s * math.log(s) + (1 - s) * math.log1p(-s), abs=1e-9)
    assert curve["kl"] == sorted(curve["kl"]) and curve["reward"][-1] > 0.999


def run_here(patch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Runs scripts in this process, which has loaded torch; returns the list of settings that they get."""
    ran: list[dict[str, str]] = []

    def run_script(script: str, config: str, settings: dict[str, str]) -> None:
        ran.append(settings)
        overrides = [f"--{key}={value}" for key, value in settings.items()]
        train_dpo.main([str(demo.REPOSITORY / config), *overrides])

    patch.setattr(demo, "run_script", run_script)
    patch.setattr(frontier, "run_script", run_script)
    return ran


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """What `frontier --quick` leaves."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("frontier")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        frontier.main(["--quick", "--out", str(out)])
    return out


@pytest.mark.slow
def test_figure_and_numbers(quick):
    """The command leaves a figure and a file of numbers, of runs in which only the loss differs."""
    assert (quick / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (quick / "frontier.svg").read_text()
    found = json.loads((quick / "frontier.json").read_text())
    names = [frontier.run_name(loss) for loss in frontier.FULL.losses]
    assert len(set(names)) == len(names)  # Each run has a name of its own.
    assert list(found["runs"]) == RUNS == ["dpo-0.1", "ipo-0.2", "simpo-2-1", "orpo-1", "kto-0.1"]
    assert found["reference"]["kl"] == pytest.approx(0, abs=1e-6)
    for points in found["runs"].values():
        assert [point["step"] for point in points] == [2, 4]
        for point in points:
            assert point["kl"] > 0 and point["reward_error"] > 0 and 0 < point["length"] < 40
    runs = [tomllib.loads((quick / name / "config.toml").read_text()) for name in RUNS]
    for key in ("lr", "schedule", "warmup_steps", "epochs", "beta2", "weight_decay"):
        assert len({run["optim"][key] for run in runs}) == 1, key
    assert len({run["model"]["path"] for run in runs}) == 1
    assert [run["optim"]["batch_size"] for run in runs] == [16] * 4 + [32]  # KTO's are half a pair each
    assert [run["loss"].get("sft_weight") for run in runs] == [0, 0, 0, 1, None]  # ORPO's is a part of it
    numbers = [(run["loss"]["name"], run["loss"].get("beta", run["loss"].get("lambda_or"))) for run in runs]
    assert numbers == [("dpo", 0.1), ("ipo", 0.2), ("simpo", 2.0), ("orpo", 1.0), ("kto", 0.1)]


@pytest.mark.slow
def test_work_is_done_once(quick, monkeypatch):
    """Only what is missing, or was measured from another reference, is trained, and to the same points."""
    ran, file, command = run_here(monkeypatch), quick / "frontier.json", ["--quick", "--out", str(quick)]
    before = file.read_text()
    frontier.main(command)
    assert not ran and file.read_text() == before
    found = json.loads(before)
    lost = found["runs"].pop(RUNS[-1])
    file.write_text(json.dumps(found))
    shutil.rmtree(quick / RUNS[-1])
    frontier.main(command)
    assert len(ran) == 1 and json.loads(file.read_text())["runs"][RUNS[-1]] == lost
    ran.clear()
    file.write_text(json.dumps(json.loads(before) | {"identity": "of another reference"}))
    frontier.main(command)
    assert len(ran) == len(RUNS) and file.read_text() == before
