"""run.tensorboard: the event files say what metrics.jsonl says, each number once, however often a run is resumed."""

import math
import sys
import time
from pathlib import Path

import pytest

import train_dpo
import train_rm
from minidpo.errors import UserError
from minidpo.metrics import MetricsFile
from runs import metrics


@pytest.fixture
def tensorboard():
    return pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")


def written(tensorboard, out: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of every event in every file, as they stand on disk; none may be there twice."""
    found: dict[tuple[str, int], float] = {}
    for file in sorted((out / "tensorboard").iterdir()):
        for event in tensorboard.EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.tensor.float_val[0]
    return found


def logged(out: Path) -> dict[tuple[str, int], float]:
    lines = metrics(out)
    return {(key, line["step"]): value for line in lines for key, value in line.items() if key != "step"}


def same(left: dict, right: dict) -> bool:
    close = (math.isclose(left[key], right[key], rel_tol=1e-6) for key in left.keys() & right.keys())
    return left.keys() == right.keys() and all(close)


@pytest.mark.parametrize("script", [train_dpo, train_rm], ids=lambda s: s.__name__)
def test_a_resumed_run_has_each_point_of_metrics_jsonl_once(script, config, tmp_path, tensorboard):
    settings = config(optim__max_steps=2, run__tensorboard="true", run__eval_every=1)
    script.main(settings)
    assert same(written(tensorboard, tmp_path / "out"), logged(tmp_path / "out"))
    script.main([*settings, "--optim.max_steps=4"])
    points = written(tensorboard, tmp_path / "out")
    assert same(points, logged(tmp_path / "out"))
    assert {step for _, step in points} == {0, 1, 2, 3, 4}


def test_points_after_the_checkpoint_of_a_killed_run_go(tmp_path, tensorboard):
    first = MetricsFile(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    for step in (1, 2, 3):
        first.write({"step": step, "loss": 1.0})
    MetricsFile(tmp_path / "metrics.jsonl", 2, tensorboard=True).write({"step": 3, "loss": 0.5})
    assert written(tensorboard, tmp_path) == {("loss", 1): 1.0, ("loss", 2): 1.0, ("loss", 3): 0.5}


def test_a_tensorboard_that_is_watching_sees_the_run_resumed(tmp_path, tensorboard):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = MetricsFile(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    watching = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0})
    assert [point.step for point in watching.Reload().Scalars("loss")] == [1, 2, 3, 4]
    time.sleep(1.1)  # event files are read in the order of their names, which count seconds
    MetricsFile(tmp_path / "metrics.jsonl", 2, tensorboard=True).write({"step": 3, "loss": 0.5})
    seen = [(point.step, point.value) for point in watching.Reload().Scalars("loss")]
    assert seen == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_every_number_is_on_disk_as_soon_as_it_is_logged(tmp_path, tensorboard):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0, tensorboard=True)
    metrics.write({"step": 1, "loss": 0.25})
    assert written(tensorboard, tmp_path) == {("loss", 1): 0.25}


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
