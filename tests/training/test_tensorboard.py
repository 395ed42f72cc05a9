"""run.tensorboard: TensorBoard shows what metrics.jsonl says, each number once, however often a run is resumed."""

import math
import sys
import time
from pathlib import Path

import pytest

import train_dpo
import train_rm
from minidpo.errors import UserError
from minidpo.log import MetricsFile
from runs import metrics


@pytest.fixture
def tensorboard():
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def shown(tensorboard, out: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of every point that TensorBoard shows; none may be there twice."""
    events = tensorboard.EventAccumulator(str(out / "tensorboard")).Reload()
    points = [((tag, p.step), p.value) for tag in events.Tags()["scalars"] for p in events.Scalars(tag)]
    assert len(points) == len(dict(points))
    return dict(points)


def logged(out: Path) -> dict[tuple[str, int], float]:
    lines = metrics(out)
    return {(key, line["step"]): value for line in lines for key, value in line.items() if key != "step"}


def same(left: dict, right: dict) -> bool:
    close = (math.isclose(left[key], right[key], rel_tol=1e-6) for key in left.keys() & right.keys())
    return left.keys() == right.keys() and all(close)


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=lambda s: s.__name__)
def test_a_resumed_run(script, config, tmp_path, tensorboard):
    """Each point of metrics.jsonl is there once."""
    settings = config(optim__max_steps=2, run__tensorboard="true", run__eval_every=1)
    script.main(settings)
    assert same(shown(tensorboard, tmp_path / "out"), logged(tmp_path / "out"))
    time.sleep(1.1)  # Event files are read in the order of their names, which count seconds.
    script.main([*settings, "--optim.max_steps=4"])
    points = shown(tensorboard, tmp_path / "out")
    assert same(points, logged(tmp_path / "out"))
    assert {step for _, step in points} == {0, 1, 2, 3, 4}


def test_points_after_the_checkpoint_go(tmp_path, tensorboard):
    """A killed run's points after its last checkpoint vanish, also from a TensorBoard that is watching."""
    first = MetricsFile(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    watching = tensorboard.EventAccumulator(str(tmp_path / "tensorboard"))
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0})
    assert [point.step for point in watching.Reload().Scalars("loss")] == [1, 2, 3, 4]
    time.sleep(1.1)
    MetricsFile(tmp_path / "metrics.jsonl", 2, tensorboard=True).write({"step": 3, "loss": 0.5})
    assert [(p.step, p.value) for p in watching.Reload().Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert shown(tensorboard, tmp_path) == {("loss", 1): 1.0, ("loss", 2): 1.0, ("loss", 3): 0.5}


def test_every_number_is_on_disk_at_once(tmp_path, tensorboard):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    metrics.write({"step": 1, "loss": 0.25})
    assert shown(tensorboard, tmp_path) == {("loss", 1): 0.25}


def test_without_the_key_nothing_is_written(config, tmp_path):
    train_dpo.main(config(optim__max_steps=1))
    assert not (tmp_path / "out" / "tensorboard").exists()


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=lambda s: s.__name__)
def test_without_the_package_one_line_at_the_start_says_what_to_install(
    script, config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="run.tensorboard = true; .*pip install tensorboard") as error:
        script.main(config(run__tensorboard="true"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
