"""run.tensorboard: TensorBoard shows what metrics.jsonl says, each number once, however often a run is
resumed."""

import sys
import time

import pytest

from minidpo.errors import UserError
from minidpo.log import MetricsFile
from runs import metrics


@pytest.fixture
def reader():
    """Opens a directory of events as TensorBoard does."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return lambda out: accumulator.EventAccumulator(str(out / "tensorboard"))


def shown(events) -> dict[tuple[str, int], float]:
    """(name, step) -> value of every point; none may be there twice."""
    events.Reload()
    points = [((name, p.step), p.value) for name in events.Tags()["scalars"] for p in events.Scalars(name)]
    assert len(points) == len(dict(points))
    return dict(points)


def test_resumed_run(script, config, tmp_path, reader):
    """Each number of metrics.jsonl is there once."""
    for steps in (2, 4):
        time.sleep(
            1.1 * (steps > 2)
        )  # Event files are read in the order of their names, which count seconds.
        script.main(config(optim__max_steps=steps, run__tensorboard="true", run__eval_every=1))
        lines = metrics(tmp_path / "out")
        logged = {(key, line["step"]): line[key] for line in lines for key in line if key != "step"}
        assert {line["step"] for line in lines} == set(range(steps + 1))
        assert shown(reader(tmp_path / "out")) == pytest.approx(logged)


def test_killed_run(tmp_path, reader):
    """Its points are on disk at once; those after its last checkpoint vanish, also from who is watching."""
    first, watching = MetricsFile(tmp_path / "metrics.jsonl", 0, tensorboard=True), reader(tmp_path)
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 1.0})
        assert ("loss", step) in shown(watching)
    time.sleep(1.1)
    MetricsFile(tmp_path / "metrics.jsonl", 2, tensorboard=True).write({"step": 3, "loss": 0.5})
    for events in (watching, reader(tmp_path)):
        assert shown(events) == {("loss", 1): 1.0, ("loss", 2): 1.0, ("loss", 3): 0.5}


def test_without_the_package(script, config, tmp_path, monkeypatch):
    """One line at the start says what to install."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"run.tensorboard in .*\.toml = true; .*pip install tensorboard$"):
        script.main(config(run__tensorboard="true"))
    assert not (tmp_path / "out").exists()
