"""`python -m minidpo frontier`: what reward each loss buys for its KL, where the true reward is known.

The DPO paper's Figure 2, in the demo's world: runs with DPO, IPO, SimPO, ORPO and KTO at several settings
start from one SFT model; at several steps of each, responses to unseen prompts are sampled and judged by
rule. The figure has the reward upwards and the distance from the reference to the right: up and to the left
is the better bargain. Runs share learning rate and pairs per step; only the loss differs. The same command
run again goes on from what is done.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidpo.errors import UserError
from minidpo.files import fingerprint, remove_directory, write_file
from minidpo.losses import DPO, IPO, KTO, ORPO, PreferenceLoss, SimPO
from minidpo.model import load_model, model_fingerprint
from minidpo.settings import keys_of, toml
from minidpo.tools.demo.command import OUT, REPOSITORY, fit_reference, from_sft, run_script
from minidpo.tools.demo.samples import Point, UnseenPrompts, best_reachable, measure
from minidpo.tools.figures import COLOURS, INK, MARKS, drawing, png_and_svg, require_matplotlib


class Scale(NamedTuple):
    """How much work the figure is."""

    losses: tuple[PreferenceLoss, ...]  # one run each
    every: int  # steps between two points of a run
    samples: int  # responses per prompt at each point
    best_samples: int  # responses per prompt of the reference, to estimate what could be reached
    sizes: dict[str, int]  # of a world of its own; empty: the demo's


FULL = Scale(
    (
        *(DPO(beta=beta) for beta in (0.03, 0.1, 0.3, 1.0)),
        *(IPO(beta=beta) for beta in (0.05, 0.2, 1.0)),
        *(SimPO(beta=beta, gamma=gamma) for beta, gamma in ((2.0, 0.0), (2.0, 1.0), (10.0, 3.0))),
        *(ORPO(lambda_or=weight) for weight in (0.1, 1.0)),
        *(KTO(beta=beta) for beta in (0.1, 0.3)),
    ),
    every=50,
    samples=2,
    best_samples=64,
    sizes={},
)
QUICK = Scale(
    (DPO(beta=0.1), IPO(beta=0.2), SimPO(beta=2.0, gamma=1.0), ORPO(lambda_or=1.0), KTO(beta=0.1)),
    every=2,
    samples=1,
    best_samples=4,
    sizes={"sft_records": 300, "train_pairs": 64, "test_pairs": 16, "test_prompts": 8},
)
CONFIG = "configs/demo_{}.toml"
NUMBERS = ("beta", "gamma", "lambda_or")
# Where the numbers of a run stand beside its end, by the kind of its loss, in points.
PLACES = ((0, -17), (0, 10), (14, -3), (-14, -3), (0, -26))
SAME_FOR_ALL = {
    "optim.lr": "1e-4",
    "optim.batch_size": "16",  # pairs
    "optim.warmup_steps": "10",
    "optim.weight_decay": "0.0",
    "run.keep_checkpoints": "1000",
    "run.eval_every": "0",
    "eval.samples": "0",  # The checkpoints are judged afterwards, with many more.
}


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo frontier", description=about)
    option = parser.add_argument
    option("--out", metavar="DIR", type=Path, default="runs/frontier", help="default: runs/frontier")
    demo_help = f"where the demo's world and SFT model are, or will be written (default: {OUT})"
    option("--demo", metavar="DIR", type=Path, help=demo_help)
    option("--quick", action="store_true", help="few steps in a tiny world of its own: does it work here?")
    options = parser.parse_args(arguments)
    require_matplotlib("frontier")
    if options.quick and options.demo:
        raise UserError("--quick makes a tiny world of its own; leave out --demo, or --quick")
    out, files = options.out, png_and_svg(options.out / "frontier")
    scale, world = (QUICK, out / "world") if options.quick else (FULL, options.demo or OUT)
    if not Path(from_sft(world)["model.path"]).is_dir():
        fit_reference(world, seed=0, **scale.sizes)
    found = measure_all(out, world, scale)
    start = Point(**found["reference"])
    runs = {loss: [Point(**point) for point in found["runs"][run_name(loss)]] for loss in scale.losses}
    draw(start, found["best_reachable"], runs, files)
    print(f"wrote {out / 'frontier.json'}, {files[0]} and {files[1]}")


def numbers(loss: PreferenceLoss) -> dict[str, float]:
    """The hyperparameters that the runs differ in, of those that the loss has."""
    return {name: getattr(loss, name) for name in NUMBERS if hasattr(loss, name)}


def run_name(loss: PreferenceLoss) -> str:
    return "-".join([loss.name, *(f"{number:g}" for number in numbers(loss).values())])


def measure_all(out: Path, world: Path, scale: Scale) -> dict[str, Any]:
    """OUT/frontier.json, completed: the points of the reference and of each run, and the best reachable."""
    unseen, file = UnseenPrompts(world), out / "frontier.json"
    # What the numbers depend on; points of another reference, or of other settings, are measured again.
    settings = from_sft(world) | SAME_FOR_ALL | {"run.save_every": str(scale.every)}
    configs = sorted({REPOSITORY / CONFIG.format(loss.name) for loss in scale.losses})
    reference = model_fingerprint(from_sft(world)["model.path"])
    identity = fingerprint(reference, *unseen.prompts, repr((settings, scale)), *configs)
    found = json.loads(file.read_text()) if file.exists() else {}
    if found.get("identity") != identity:
        print(f"sampling the reference, {scale.best_samples} responses per prompt", flush=True)
        start = measure(unseen, unseen.reference, 0, scale.samples)
        seeds = range(1000, 1000 + scale.best_samples)  # not those of the reference's own point
        best = best_reachable([unseen.sample(unseen.reference, seed) for seed in seeds])
        found = {"identity": identity, "reference": start._asdict(), "best_reachable": best, "runs": {}}
    for loss in scale.losses:
        if (name := run_name(loss)) not in found["runs"]:
            checkpoints = train(loss, out / name, settings)
            print(f"measuring {name} at steps {', '.join(map(str, checkpoints))}", flush=True)
            models = ((step, load_model(path)) for step, path in checkpoints.items())
            points = [measure(unseen, model, step, scale.samples)._asdict() for step, model in models]
            found["runs"][name] = points
            write_file(file, json.dumps(found, indent=1) + "\n")
            remove_directory(out / name / "checkpoints")  # Each checkpoint has 30 MB.
    return found


def train(loss: PreferenceLoss, directory: Path, settings: dict[str, str]) -> dict[int, Path]:
    """Train with one loss by the ordinary script; returns its checkpoints by step."""
    of_loss = {f"loss.{name}": toml(getattr(loss, name)) for name in keys_of(loss)}
    if loss.unpaired:  # A pair is two of its records.
        of_loss["optim.batch_size"] = str(2 * int(SAME_FOR_ALL["optim.batch_size"]))
    run_script("train_dpo.py", CONFIG.format(loss.name), settings | of_loss | {"run.out": str(directory)})
    paths = (directory / "checkpoints").glob("step-*")
    return dict(sorted((int(path.name.removeprefix("step-")), path) for path in paths))


def draw(
    start: Point, best: dict[str, list[float]], runs: dict[PreferenceLoss, list[Point]], files: list[Path]
) -> None:
    """Reward against KL, on a square-root axis that leaves room both near the reference and far from it."""
    with drawing(files, 7.2, 4.8) as figure:
        axes = figure.subplots()
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.plot(best["kl"], best["reward"], "--", color=INK, label="most that a policy can earn, estimated")
        star: dict[str, Any] = {"ms": 11, "color": INK, "zorder": 4, "clip_on": False}
        axes.plot(start.kl, start.reward, "*", label="SFT, the reference", **star)
        kinds = list(dict.fromkeys(type(loss) for loss in runs))
        for kind, colour, mark in zip(kinds, COLOURS, MARKS, strict=False):
            names = ", ".join(numbers(kind()))
            axes.plot([], [], mark, ms=8, color=colour, label=f"{kind.__name__} ({names})")
        for loss, points in runs.items():
            number, end = kinds.index(type(loss)), points[-1]
            look: dict[str, Any] = {"color": COLOURS[number], "marker": MARKS[number]}
            # A thin line from the reference on, small marks, and a large one at the end with standard errors.
            way = [start, *points]
            places = [point.kl for point in way], [point.reward for point in way]
            axes.plot(*places, lw=0.8, ms=3.5, alpha=0.5, markevery=slice(1, -1), **look)
            ends = end.kl, end.reward, end.reward_error, end.kl_error
            axes.errorbar(*ends, ms=8, mec="white", elinewidth=1, **look)
            text = ", ".join(f"{value:g}" for value in numbers(loss).values())
            beside = {"xytext": PLACES[number], "textcoords": "offset points", "ha": "center"}
            axes.annotate(text, (end.kl, end.reward), color=COLOURS[number], **beside)
        farthest = max(point.kl for points in runs.values() for point in points)
        # Squares are equally far apart on this axis.
        axes.set(xlim=(0, None), xticks=[n * n for n in range(math.ceil(math.sqrt(farthest)) + 1)])
        axes.set_xlabel("KL from the reference, nats per response (square-root scale)")
        axes.set_ylabel("true reward of sampled responses, nats")
        axes.set_title("What each loss earns for how far it goes from the reference")
        axes.legend(loc="upper right")
