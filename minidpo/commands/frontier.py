"""`python -m minidpo frontier`: what reward each loss buys for its KL, in the demo's world, whose true reward is known.

The DPO paper's Figure 2: DPO, IPO and SimPO at several settings start from one SFT model; at several steps of each run
answers to unseen prompts are sampled and judged by rule. Reward up, distance from the reference to the right: a point
further up and to the left is the better bargain. All runs have one learning rate and batch; only the loss differs.
Run again, the command takes up what is done. frontier_plot.py draws and prints.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from minidpo.commands.demo import FROM_SFT, OUT, ROOT, fit_reference, run_script, within
from minidpo.commands.figures import require_matplotlib
from minidpo.commands.frontier_judge import Judge, Point, Setting
from minidpo.commands.frontier_plot import draw, table
from minidpo.errors import UserError
from minidpo.files import fingerprint, remove_directory, replacing_file, writing
from minidpo.weights import load_model


class Scale(NamedTuple):
    """How much work the figure is."""

    settings: tuple[Setting, ...]
    every: int  # steps between two points of a run
    samples: int  # answers a prompt of each point
    best_samples: int  # answers a prompt of the reference, to see what could be reached
    sizes: dict[str, int]  # of a world of its own; empty: the demo's


FULL = Scale(
    (
        *(Setting("dpo", beta) for beta in (0.03, 0.1, 0.3, 1.0)),
        *(Setting("ipo", beta) for beta in (0.05, 0.2, 1.0)),
        *(Setting("simpo", beta, gamma) for beta, gamma in ((2.0, 0.0), (2.0, 1.0), (10.0, 3.0))),
    ),
    every=50,
    samples=2,
    best_samples=64,
    sizes={},
)
QUICK = Scale(
    (Setting("dpo", 0.1), Setting("ipo", 0.2), Setting("simpo", 2.0, 1.0)),
    every=2,
    samples=1,
    best_samples=4,
    sizes={"sft_records": 300, "train_pairs": 64, "test_pairs": 16, "test_prompts": 8},
)
SAME_FOR_ALL = {
    "optim.lr": "1e-4",
    "optim.batch_size": "16",
    "run.keep_checkpoints": "1000",
    "eval.samples": "0",  # checkpoints are judged afterwards, with many more
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo frontier", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--out", metavar="DIR", default="runs/frontier", help="default: runs/frontier")
    parser.add_argument(
        "--demo",
        metavar="DIR",
        help=f"where the demo's world and SFT model are, or will be written (default: {OUT})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps in a tiny world of its own: does it work here?"
    )
    options = parser.parse_args(arguments)
    require_matplotlib("frontier")
    started, out = time.monotonic(), Path(options.out)
    scale, world = (QUICK, out / "world") if options.quick else (FULL, Path(options.demo or OUT))
    if options.quick and options.demo:
        raise UserError("--quick makes a tiny world of its own; leave out --demo, or --quick")
    if not (world / "sft" / "final").is_dir():
        fit_reference(world, seed=0, **scale.sizes)
    judge = Judge(world, scale.samples, scale.best_samples)
    print(
        f"sampling the reference, {scale.best_samples} answers to each of {len(judge.prompts)} prompts",
        flush=True,
    )
    start = cached(out / "reference.json", judge.identity, lambda: judge.point(judge.reference, 0)._asdict())
    best = cached(out / "best.json", judge.identity, judge.best)
    runs = {setting: run(setting, out, world, scale, judge) for setting in scale.settings}
    start_point = Point(**start)
    with writing(out), replacing_file(out / "frontier.json") as temporary:
        temporary.write_text(json.dumps(to_json(start_point, best, runs), indent=1) + "\n")
    print("\n" + table(start_point, runs))
    files = draw(start_point, best, runs, out / "frontier")
    print(f"\n{time.monotonic() - started:.0f} s; wrote {out / 'frontier.json'}, {files[0]} and {files[1]}")


def run(setting: Setting, out: Path, world: Path, scale: Scale, judge: Judge) -> list[Point]:
    """Train with one setting by the ordinary script, and judge its checkpoints: a point each."""
    directory, config = out / setting.name, f"configs/demo_{setting.loss}.toml"
    settings = within(world, FROM_SFT) | SAME_FOR_ALL | {"run.save_every": str(scale.every)}
    settings |= {"loss.beta": str(setting.beta)}
    if setting.gamma is not None:
        settings["loss.gamma"] = str(setting.gamma)

    def points() -> list[dict[str, float]]:
        reference = out / "reference.safetensors"  # the same log-probs for all; the script checks that
        if reference.exists() and not (directory / reference.name).exists():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(reference, directory / reference.name)
        run_script("train_dpo.py", config, settings | {"run.out": str(directory)})
        if not reference.exists() and (directory / reference.name).exists():
            shutil.copyfile(directory / reference.name, reference)
        steps = sorted(int(path.name[5:]) for path in (directory / "checkpoints").glob("step-*"))
        if steps[0] > scale.every:
            raise UserError(f"{directory}: its early checkpoints are gone; delete it, to train it again")
        print(f"judging {setting.name} at steps {', '.join(map(str, steps))}", flush=True)
        return [judge.point(load_model(checkpoint(directory, s)), s)._asdict() for s in steps]

    identity = judge.identity | {"settings": settings, "config": fingerprint(ROOT / config)}
    found = cached(directory / "points.json", identity, points)
    # 30 MB each. The last stays: with it the same command finds that nothing is left to do.
    for point in found[:-1]:
        if checkpoint(directory, point["step"]).exists():
            remove_directory(checkpoint(directory, point["step"]))
    return [Point(**point) for point in found]


def checkpoint(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step-{step}"


def cached(file: Path, identity: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """What `file` holds if it was computed for this `identity`; else compute it and keep it there."""
    if file.exists():
        stored = json.loads(file.read_text())
        if stored["identity"] == identity:
            return stored["value"]
    value = compute()
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(file) as temporary:
            temporary.write_text(json.dumps({"identity": identity, "value": value}, indent=1) + "\n")
    return value


def to_json(start: Point, best: dict[str, list[float]], runs: dict[Setting, list[Point]]) -> dict[str, Any]:
    return {
        "reference": start._asdict(),
        "best_reachable": best,
        "runs": [setting._asdict() | {"points": [p._asdict() for p in ps]} for setting, ps in runs.items()],
    }
