"""Figures of runs: what is measured is drawn and nothing else, whatever state metrics.jsonl is in."""

import sys
from pathlib import Path

import numpy as np
import pytest

from minidpo.errors import UserError
from minidpo.tools import frontier
from minidpo.tools import plot as command
from minidpo.tools.figures import COLOURS, MARKS, png_and_svg
from record_files import write
from runs import run_dpo, run_rm

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure  # noqa: E402

PAIRS = ("rewards/accuracies", "rewards/margins", "response_length/chosen", "response_length/rejected")
DPO = ("loss", "rewards/chosen", "rewards/rejected", *PAIRS)
RM = ("loss", "preference_loss", "lm_loss", "accuracy", "margin", "mean_reward")


def write_run(directory: Path, keys: tuple[str, ...] = DPO, loss: str = "dpo", end: tuple = ()) -> Path:
    """Ten logged steps and three evaluations; the n-th key's value at a step is n + step / 100."""
    directory.mkdir(parents=True)
    lines = []
    for step in range(1, 11):
        values = {key: n + step / 100 for n, key in enumerate(keys)}
        lines.append({"step": step, "lr": 1e-4, "grad_norm": 1.0} | values)
    for step in (0, 5, 10):
        lines.append({"step": step} | {f"eval/{key}": n + step / 100 for n, key in enumerate(keys)})
    write(directory / "metrics.jsonl", *lines, *end)
    (directory / "config.toml").write_text(f'[loss]\nname = "{loss}"\n')
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """Runs `plot`; returns the figure, which is not written, and its axes by title."""

    def run(*arguments: object):
        figures = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
        command.main(list(map(str, arguments)))
        return figures[0], {axes.get_title(loc="left"): axes for axes in figures[0].axes}

    return run


def test_files(tmp_path, capsys):
    """PNG and SVG are written into the run, and nothing else; the same figure has the same bytes."""
    run = write_run(tmp_path / "dpo-0.1")
    command.main([str(run)])
    assert {p.name for p in run.iterdir()} == {"metrics.jsonl", "config.toml", "curves.png", "curves.svg"}
    assert f"wrote {run / 'curves'}.png" in capsys.readouterr().out
    command.main([str(run), "--out", str(tmp_path / "again.svg")])
    for kind in ("png", "svg"):
        assert (run / f"curves.{kind}").read_bytes() == (tmp_path / f"again.{kind}").read_bytes()
    assert png_and_svg("a/dpo-0.1") == [Path("a/dpo-0.1.png"), Path("a/dpo-0.1.svg")]  # no suffix, that dot


def test_curves(drawn, tmp_path):
    """The curves are the values in metrics.jsonl; chosen and rejected differ in colour, line and mark."""
    _, panels = drawn(write_run(tmp_path / "run"))
    training, held_out = panels["Margin of rewards, nats"].lines
    for line, steps in ((held_out, [0, 5, 10]), (training, range(1, 11))):
        assert line.get_xdata().tolist() == list(steps)
        assert line.get_ydata().tolist() == pytest.approx([4 + step / 100 for step in steps])
    assert training.get_linewidth() < held_out.get_linewidth() and training.get_marker() == "None"
    _, chosen, _, rejected = panels["Reward, nats"].lines
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(chosen, look)() != getattr(rejected, look)()


def test_panels(drawn, tmp_path):
    """Every panel names its quantity, its unit and what is good; what was not measured, or never changed (the
    learning rate, the gradient norm), has none."""
    pairs, length = ["Accuracy, share of pairs", "Margin of rewards, nats"], "Response length (data), tokens"
    _, dpo = drawn(write_run(tmp_path / "dpo"))
    assert list(dpo) == ["Loss, nats", *pairs, "Reward, nats", length]
    assert [text.get_text() for text in dpo["Accuracy, share of pairs"].texts] == ["rises above 0.5"]
    _, rm = drawn(write_run(tmp_path / "rm", RM))
    first = ["Loss, nats", "Preference loss, nats", *pairs, "LM loss, nats per token", "Mean reward, nats"]
    assert list(rm) == first and len(first) == 6
    _, ipo = drawn(write_run(tmp_path / "ipo", ("loss",), "ipo"))
    assert list(ipo) == ["Loss, nats²"]


def test_level(drawn, tmp_path):
    """The value to compare with is drawn where it lies among the values, and never stretches the axis."""
    for name, values in (("near", (0.0, 12.0)), ("far", (0.0, 0.2))):
        (tmp_path / name).mkdir()
        lines = ({"step": step, "eval/kl": value} for step, value in enumerate(values))
        write(tmp_path / name / "metrics.jsonl", *lines)
        (kl,) = drawn(tmp_path / name)[1].values()
        levels = [line.get_ydata()[0] for line in kl.lines[1:]]
        assert levels == ([command.MOST_KL] if name == "near" else [])
        assert kl.get_ylim()[1] < 1.1 * values[1]


def test_keys(config, tmp_path):
    """Every plotted key is one the scripts write: the panel of a renamed metric would vanish unnoticed."""
    run_rm(config(), f"--run.out={tmp_path / 'rm'}")
    judged = f"--eval.reward_model={tmp_path / 'rm' / 'final'}"
    run_dpo(config(eval__samples=2, eval__max_new_tokens=4), judged)
    runs = command.read_runs([tmp_path / "rm", tmp_path / "out"])
    written = {key.removeprefix("eval/") for run in runs for key in run.curves}
    assert all(set(panel.keys) & written for panel in command.PANELS)


def test_compared(drawn, tmp_path):
    """Compared runs differ in colour and mark, and one legend names them."""
    assert len(set(COLOURS)) == len(set(MARKS)) == len(MARKS) == 9
    runs = [write_run(tmp_path / name) for name in ("slow", "fast", "other/fast")]
    figure, panels = drawn(*runs, "--out", tmp_path / "all.png")
    assert (tmp_path / "all.png").exists() and (tmp_path / "all.svg").exists()
    held_out = [line for line in panels["Loss, nats"].lines if line.get_marker() != "None"]
    assert len({line.get_color() for line in held_out}) == len({line.get_marker() for line in held_out}) == 3
    # Two directories have one name, so that only paths tell the runs apart.
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*map(str, runs)]
    assert not any(axes.get_legend() for axes in panels.values())


@pytest.mark.parametrize(
    "end", [('{"step": 11, "loss": 0.',), ('{"step": 11, "loss": NaN}', '{"step": 12, "loss": null}')]
)
def test_gaps(drawn, tmp_path, end):
    """A torn last line is passed over, and values that are not finite are gaps."""
    _, panels = drawn(write_run(tmp_path / "run", end=end))
    assert max(panels["Loss, nats"].lines[0].get_xdata()) == 10


def test_few(drawn, tmp_path):
    """One or two values in training have marks, so that they are seen."""
    for count in (2, 3):
        write_run(tmp_path / str(count), ())
        write(tmp_path / str(count) / "metrics.jsonl", *({"step": k, "loss": k} for k in range(count)))
    _, panels = drawn(tmp_path / "2", tmp_path / "3")
    assert [line.get_marker() for line in panels["Loss, nats"].lines] == [".", "None"]


def test_smoothing():
    """It takes the noise away and keeps a straight line, the first and the last value included."""
    assert command.smoothed(np.array([0.0, 1.0] * 32))[8:-8] == pytest.approx(0.5, abs=0.06)
    line = np.arange(64.0)
    assert command.smoothed(line) == pytest.approx(line)  # the first loss, 0.6931, stays where it is


@pytest.mark.parametrize(("main", "arguments"), [(command.main, []), (frontier.main, ["--quick", "--out"])])
def test_without_matplotlib(monkeypatch, tmp_path, main, arguments):
    """One line names the extra, before anything is read or trained."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        main([*arguments, str(tmp_path / "nowhere")])
    assert not (tmp_path / "nowhere").exists()
