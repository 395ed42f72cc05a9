"""Figures of runs: what is measured is drawn and nothing else, whatever state metrics.jsonl is in."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minidpo.commands import plot as command
from minidpo.commands.figures import COLOURS, MARKS, drawing, label_points, png_and_svg
from minidpo.errors import UserError

pytest.importorskip("matplotlib")

PREFERENCE = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
              "response_length/chosen", "response_length/rejected")  # fmt: skip
REWARD = ("loss", "preference_loss", "lm_loss", "accuracy", "margin", "mean_reward")


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


def test_a_run_becomes_a_png_and_an_svg_and_nothing_else(tmp_path, capsys):
    run = write_run(tmp_path / "dpo-0.1")
    command.main([str(run)])
    assert (run / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (run / "curves.svg").read_text()
    assert {p.name for p in run.iterdir()} == {"metrics.jsonl", "config.toml", "curves.png", "curves.svg"}
    assert f"wrote {run / 'curves'}.png" in capsys.readouterr().out


def test_the_curves_are_the_values_in_metrics_jsonl(tmp_path, monkeypatch):
    _, panels = drawn(monkeypatch, write_run(tmp_path / "run"))
    training, held_out = panels["Margin of rewards, nats"].lines
    assert held_out.get_xdata().tolist() == [0, 5, 10]
    assert held_out.get_ydata().tolist() == pytest.approx([4, 4.05, 4.1])
    assert training.get_xdata().tolist() == list(range(1, 11))
    assert training.get_ydata().tolist() == pytest.approx([4 + s / 100 for s in range(1, 11)])
    assert training.get_linewidth() < held_out.get_linewidth() and training.get_marker() == "None"


def test_every_panel_names_quantity_and_unit_and_panels_without_data_are_left_out(tmp_path, monkeypatch):
    _, preference = drawn(monkeypatch, write_run(tmp_path / "a"))
    assert list(preference) == ["Loss, nats", "Reward, nats", "Margin of rewards, nats", "Accuracy, share of pairs",
                                "Response length (data), tokens", "Learning rate", "Gradient norm"]  # fmt: skip
    _, with_kl = drawn(monkeypatch, write_run(tmp_path / "b", (*PREFERENCE, "kl"), loss="ipo"))
    assert with_kl.keys() - preference.keys() == {"Loss, nats²", "KL from the reference, nats"}
    sampled = ("reward", "win_rate", "ended", "sample_length")
    _, with_samples = drawn(monkeypatch, write_run(tmp_path / "d", (*PREFERENCE, *sampled)))
    assert with_samples.keys() - preference.keys() == {
        "Reward of samples, nats", "Samples that win, share", "Samples that ended, share",
        "Sampled length, tokens"}  # fmt: skip
    _, reward = drawn(monkeypatch, write_run(tmp_path / "c", REWARD, loss=""))
    assert list(reward) == ["Loss, nats", "Preference loss, nats", "LM loss, nats a token", "Mean reward, nats",
                            "Margin of rewards, nats", "Accuracy, share of pairs", "Learning rate", "Gradient norm"]  # fmt: skip


def test_chosen_and_rejected_differ_in_colour_line_and_mark(tmp_path, monkeypatch):
    _, panels = drawn(monkeypatch, write_run(tmp_path / "run"))
    _, chosen, _, rejected = panels["Reward, nats"].lines
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(chosen, look)() != getattr(rejected, look)()


def test_compared_runs_differ_in_colour_and_mark_and_one_legend_names_them(tmp_path, monkeypatch):
    runs = [write_run(tmp_path / name) for name in ("slow", "fast", "other/fast")]
    figure, panels = drawn(monkeypatch, *runs, "--out", tmp_path / "all.png")
    assert (tmp_path / "all.png").exists() and (tmp_path / "all.svg").exists()
    held_out = [line for line in panels["Loss, nats"].lines if line.get_marker() != "None"]
    assert len({(line.get_color(), line.get_marker()) for line in held_out}) == 3
    assert len({line.get_color() for line in held_out}) == len({line.get_marker() for line in held_out}) == 3
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts() if text.get_text().strip()]
    # Two directories of one name are told apart by their paths.
    assert sorted(named) == sorted(["slow", str(runs[1]), str(runs[2]), "chosen", "rejected", "held out",
                                    "training, smoothed"])  # fmt: skip
    assert not any(axes.get_legend() for axes in panels.values())


def test_a_torn_last_line_is_passed_over_and_any_other_bad_line_is_named(tmp_path, monkeypatch):
    torn = write_run(tmp_path / "torn", end='{"step": 11, "loss": 0.')
    _, panels = drawn(monkeypatch, torn)
    assert max(panels["Loss, nats"].lines[0].get_xdata()) == 10
    bad = write_run(tmp_path / "bad", end='{"step": 11, "loss": 0.\n{"step": 12}\n')
    with pytest.raises(UserError, match=r"bad/metrics.jsonl:14: .*no line of metrics"):
        command.main([str(bad)])


def test_values_that_are_not_finite_are_gaps(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", end='{"step": 11, "loss": NaN}\n{"step": 12, "loss": null}\n')
    _, panels = drawn(monkeypatch, run)
    assert max(panels["Loss, nats"].lines[0].get_xdata()) == 10


def test_two_evaluations_are_marks_without_a_line_between_them(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 6.4}\n{"step": 900, "eval/loss": 0.5}\n')
    _, panels = drawn(monkeypatch, run)
    assert [line.get_linestyle() for line in panels["Loss, nats"].lines] == ["None"]


def test_smoothing_keeps_the_mean_of_a_line_and_takes_the_noise():
    noisy = command.np.array([0.0, 1.0] * 32)
    assert command.smoothed(noisy)[8:-8] == pytest.approx(0.5, abs=0.06)
    line = command.np.arange(64.0)
    assert command.smoothed(line) == pytest.approx(line)  # the first loss, 0.6931, stays where it is
    assert command.smoothed(line[:5]).tolist() == line[:5].tolist()  # too few to smooth


@pytest.mark.parametrize("written", [None, "", '{"step": 1'])
def test_a_run_without_metrics_is_one_line(tmp_path, written):
    if written is not None:
        (tmp_path / "metrics.jsonl").write_text(written)
    with pytest.raises(UserError, match="no such file; plot takes|no step in it yet") as error:
        command.main([str(tmp_path)])
    assert "\n" not in str(error.value)


def test_without_matplotlib_one_line_names_the_extra_before_anything_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plot\]'"):
        command.main(["nowhere"])


def test_a_name_with_a_dot_keeps_it():
    assert png_and_svg("runs/dpo-0.1") == [Path("runs/dpo-0.1.png"), Path("runs/dpo-0.1.svg")]
    assert png_and_svg("a/b.svg") == png_and_svg("a/b.png") == png_and_svg(Path("a/b"))


def test_more_runs_than_colours_are_refused():
    assert len(set(COLOURS)) == len(set(MARKS)) == len(MARKS) == 9
    with pytest.raises(UserError, match="10 runs; at most 9"):
        command.main(["x"] * 10)


def test_the_same_figure_has_the_same_bytes(tmp_path):
    run = write_run(tmp_path / "run")
    for name in "ab":
        command.main([str(run), "--out", str(tmp_path / name)])
    for kind in ("png", "svg"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_every_key_that_is_plotted_is_one_the_scripts_write(config, tmp_path, monkeypatch):
    """A renamed metric would leave its panel out, and nobody would see it go."""
    import train_dpo
    import train_rm

    train_rm.main([*config(), f"--run.out={tmp_path / 'rm'}"])
    _, rm = drawn(monkeypatch, tmp_path / "rm")
    judged = f"--eval.reward_model={tmp_path / 'rm' / 'final'}"
    train_dpo.main([*config(eval__samples=2, eval__max_new_tokens=4), judged])
    _, dpo = drawn(monkeypatch, tmp_path / "out")
    titles = {re.sub("^Loss$", "Loss, nats", panel.title) for panel in command.PANELS}
    assert titles == dpo.keys() | rm.keys()


def test_a_directory_that_is_none_is_one_line_and_status_2(tmp_path):
    typed = [sys.executable, "-m", "minidpo", "plot", str(tmp_path / "nowhere")]
    result = subprocess.run(typed, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_labels_cover_neither_points_nor_each_other(tmp_path):
    """A cross of five points, close together: to the upper right of each there is another."""
    points = [(x, y, "0.05", "black") for x, y in ((5, 5), (5.3, 5.3), (4.7, 4.7), (5.3, 4.7), (4.7, 5.3))]
    with drawing([tmp_path / "a.png"], 5, 5) as figure:
        axes = figure.subplots()
        axes.plot([0, 10], [0, 10], ".")
        label_points(figure, axes, points, [(5.5, 5.5)])
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        places = axes.transData.transform([point[:2] for point in points])
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*place) for box in boxes for place in places)
