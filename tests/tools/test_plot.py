"""Figures of runs: what is measured is drawn and nothing else, whatever state metrics.jsonl is in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minidpo.errors import UserError
from minidpo.tools import plot as command
from minidpo.tools.figures import COLOURS, MARKS, png_and_svg

pytest.importorskip("matplotlib")

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
PREFERENCE = ("loss", *REWARDS, "response_length/chosen", "response_length/rejected")
REWARD = ("loss", "preference_loss", "lm_loss", "accuracy", "margin", "mean_reward")
ALWAYS = ["Learning rate", "Gradient norm"]


def write_run(directory: Path, keys: tuple[str, ...] = PREFERENCE, loss: str = "dpo", end: str = "") -> Path:
    """Ten logged steps and three evaluations; the n-th key's value at a step is n + step / 100."""
    directory.mkdir(parents=True)
    values = {key: n for n, key in enumerate(keys)}
    lines = [
        {"step": s, "lr": 1e-4, "grad_norm": 1.0} | {k: n + s / 100 for k, n in values.items()}
        for s in range(1, 11)
    ]
    lines += [{"step": s} | {f"eval/{k}": n + s / 100 for k, n in values.items()} for s in (0, 5, 10)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    if loss:
        (directory / "config.toml").write_text(f'[loss]\nname = "{loss}"\n')
    return directory


def drawn(monkeypatch, *arguments: object):
    """The figure that the command draws: titles -> axes."""
    figures = []
    real = command.legend
    monkeypatch.setattr(
        command, "legend", lambda figure, *rest: (figures.append(figure), real(figure, *rest))
    )
    command.main([str(argument) for argument in arguments])
    return figures[0], {axes.get_title(loc="left"): axes for axes in figures[0].axes}


def test_png_and_svg(tmp_path, capsys):
    """The command writes a PNG and an SVG into the run, and nothing else."""
    run = write_run(tmp_path / "dpo-0.1")
    command.main([str(run)])
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (run / "curves.svg").read_text()
    assert {p.name for p in run.iterdir()} == {"metrics.jsonl", "config.toml", "curves.png", "curves.svg"}
    assert f"wrote {run / 'curves'}.png" in capsys.readouterr().out


def test_curves_are_the_metrics(tmp_path, monkeypatch):
    """The curves are the values in metrics.jsonl."""
    _, panels = drawn(monkeypatch, write_run(tmp_path / "run"))
    training, held_out = panels["Margin of rewards, nats"].lines
    assert held_out.get_xdata().tolist() == [0, 5, 10]
    assert held_out.get_ydata().tolist() == pytest.approx([4, 4.05, 4.1])
    assert training.get_xdata().tolist() == list(range(1, 11))
    assert training.get_ydata().tolist() == pytest.approx([4 + s / 100 for s in range(1, 11)])
    assert training.get_linewidth() < held_out.get_linewidth() and training.get_marker() == "None"


def test_panels(tmp_path, monkeypatch):
    """Every panel names its quantity and unit, and panels without data are left out."""
    _, preference = drawn(monkeypatch, write_run(tmp_path / "a"))
    pairs = ["Reward, nats", "Margin of rewards, nats", "Accuracy, share of pairs"]
    assert list(preference) == ["Loss, nats", *pairs, "Response length (data), tokens", *ALWAYS]
    _, with_kl = drawn(monkeypatch, write_run(tmp_path / "b", (*PREFERENCE, "kl"), loss="ipo"))
    assert with_kl.keys() - preference.keys() == {"Loss, nats²", "KL from the reference, nats"}
    _, with_samples = drawn(
        monkeypatch,
        write_run(tmp_path / "d", (*PREFERENCE, "reward", "win_rate", "ended", "sample_length")),
    )
    shares = {"Samples that win, share", "Samples that ended, share"}
    assert with_samples.keys() - preference.keys() == shares | {
        "Reward of samples, nats",
        "Sampled length, tokens",
    }
    _, reward = drawn(monkeypatch, write_run(tmp_path / "c", REWARD, loss=""))
    losses = ["Loss, nats", "Preference loss, nats", "LM loss, nats per token"]
    assert list(reward) == [*losses, "Mean reward, nats", *pairs[1:], *ALWAYS]


def test_chosen_and_rejected_differ(tmp_path, monkeypatch):
    """Chosen and rejected differ in colour, line and mark."""
    _, panels = drawn(monkeypatch, write_run(tmp_path / "run"))
    _, chosen, _, rejected = panels["Reward, nats"].lines
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(chosen, look)() != getattr(rejected, look)()


def test_compared_runs(tmp_path, monkeypatch):
    """Compared runs differ in colour and mark, and one legend names them."""
    runs = [write_run(tmp_path / name) for name in ("slow", "fast", "other/fast")]
    figure, panels = drawn(monkeypatch, *runs, "--out", tmp_path / "all.png")
    assert (tmp_path / "all.png").exists() and (tmp_path / "all.svg").exists()
    held_out = [line for line in panels["Loss, nats"].lines if line.get_marker() != "None"]
    assert len({(line.get_color(), line.get_marker()) for line in held_out}) == 3
    assert len({line.get_color() for line in held_out}) == len({line.get_marker() for line in held_out}) == 3
    (legend,) = figure.legends
    # Two directories have one name, so that only paths tell the runs apart.
    styles = ["chosen", "rejected", "held out", "training, smoothed"]
    assert [text.get_text() for text in legend.get_texts()] == [*map(str, runs), *styles]
    assert not any(axes.get_legend() for axes in panels.values())


def test_torn_line(tmp_path, monkeypatch):
    """A torn last line is passed over, and any other bad line is named."""
    torn = write_run(tmp_path / "torn", end='{"step": 11, "loss": 0.')
    _, panels = drawn(monkeypatch, torn)
    assert max(panels["Loss, nats"].lines[0].get_xdata()) == 10
    bad = write_run(tmp_path / "bad", end='{"step": 11, "loss": 0.\n{"step": 12}\n')
    with pytest.raises(UserError, match=r"bad/metrics.jsonl:14: "):
        command.main([str(bad)])


def test_not_finite(tmp_path, monkeypatch):
    """Values that are not finite are gaps."""
    run = write_run(tmp_path / "run", end='{"step": 11, "loss": NaN}\n{"step": 12, "loss": null}\n')
    _, panels = drawn(monkeypatch, run)
    assert max(panels["Loss, nats"].lines[0].get_xdata()) == 10


def test_two_evaluations(tmp_path, monkeypatch):
    """Two evaluations are marks without a line between them."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 6.4}\n{"step": 900, "eval/loss": 0.5}\n')
    _, panels = drawn(monkeypatch, run)
    assert [line.get_linestyle() for line in panels["Loss, nats"].lines] == ["None"]


def test_smoothing():
    """It takes the noise away and keeps a straight line, the first and the last value included."""
    noisy = command.np.array([0.0, 1.0] * 32)
    assert command.smoothed(noisy)[8:-8] == pytest.approx(0.5, abs=0.06)
    line = command.np.arange(64.0)
    assert command.smoothed(line) == pytest.approx(line)  # the first loss, 0.6931, stays where it is
    assert command.smoothed(line[:5]).tolist() == line[:5].tolist()  # too few to smooth


@pytest.mark.parametrize("written", [None, "", '{"step": 1'])
def test_no_metrics(tmp_path, written):
    """A run without metrics is one line."""
    if written is not None:
        (tmp_path / "metrics.jsonl").write_text(written)
    with pytest.raises(UserError, match="no such file; plot takes|no step in it yet") as error:
        command.main([str(tmp_path)])
    assert "\n" not in str(error.value)


def test_without_matplotlib(monkeypatch):
    """One line names the extra, before anything is read."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        command.main(["nowhere"])


def test_name_with_a_dot():
    """A dot in a name stays, but for the suffixes of the two files."""
    assert png_and_svg("runs/dpo-0.1") == [Path("runs/dpo-0.1.png"), Path("runs/dpo-0.1.svg")]
    assert png_and_svg("a/b.svg") == png_and_svg("a/b.png") == png_and_svg(Path("a/b"))


def test_too_many_runs():
    """More runs than colours are refused."""
    assert len(set(COLOURS)) == len(set(MARKS)) == len(MARKS) == 9
    with pytest.raises(UserError, match="10 runs; at most 9"):
        command.main(["x"] * 10)


def test_same_bytes(tmp_path):
    """The same figure has the same bytes."""
    run = write_run(tmp_path / "run")
    for name in "ab":
        command.main([str(run), "--out", str(tmp_path / name)])
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_keys_are_those_of_the_scripts(config, tmp_path, monkeypatch):
    """Every plotted key is one the scripts write: the panel of a renamed metric would vanish unnoticed."""
    import train_dpo
    import train_rm

    train_rm.main([*config(), f"--run.out={tmp_path / 'rm'}"])
    _, rm = drawn(monkeypatch, tmp_path / "rm")
    judged = f"--eval.reward_model={tmp_path / 'rm' / 'final'}"
    train_dpo.main([*config(eval__samples=2, eval__max_new_tokens=4), judged])
    _, dpo = drawn(monkeypatch, tmp_path / "out")
    titles = set(command.PANELS) - {"Loss"} | {"Loss, nats"}
    assert titles == dpo.keys() | rm.keys()


def test_no_such_directory(tmp_path):
    """A directory that does not exist is one line and status 2."""
    typed = [sys.executable, "-m", "minidpo", "plot", str(tmp_path / "nowhere")]
    result = subprocess.run(typed, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.returncode == 2 and result.stderr.count("\n") == 1
