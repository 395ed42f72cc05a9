"""`python -m minidpo frontier`: what reward each loss buys for its KL, in the demo's world, whose true reward is known.

The DPO paper's Figure 2: DPO, IPO and SimPO at several settings start from one SFT model; at several steps of each run
answers to unseen prompts are sampled and judged by rule. Reward up, distance from the reference to the right: a point
further up and to the left is the better bargain. All runs have one learning rate and batch; only the loss differs.
Run again, the command takes up what is done. frontier_plot.py draws and prints.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidpo.commands.answers import answer, divergences
from minidpo.commands.demo import FROM_SFT, OUT, fit_reference, run_script, unseen_prompts, within
from minidpo.commands.figures import require_matplotlib
from minidpo.errors import UserError
from minidpo.files import fingerprint, remove_directory, replacing_file, writing
from minidpo.model import Transformer
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model, model_fingerprint


class Setting(NamedTuple):
    loss: str
    beta: float
    gamma: float | None = None  # simpo's

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.beta:g}" + (f"-{self.gamma:g}" if self.gamma is not None else "")


class Point(NamedTuple):
    """A policy at one step. Standard errors are over prompts: the answers to one prompt are averaged first."""

    step: int
    reward: float  # mean r* of its answers, nats
    reward_error: float
    kl: float  # KL(policy || reference) a response, nats: mean of `Divergences.token_kls`
    kl_error: float
    kl_log_ratio: float  # the same by log-ratios, with more noise: the two should agree
    kl_log_ratio_error: float
    length: float  # words


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
SAME_FOR_ALL = {"optim.lr": "1e-4", "optim.batch_size": "16", "run.keep_checkpoints": "1000"}


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
    from minidpo.commands.frontier_plot import draw, table

    started, out = time.monotonic(), Path(options.out)
    scale, world = (QUICK, out / "world") if options.quick else (FULL, Path(options.demo or OUT))
    if options.quick and options.demo:
        raise UserError("--quick makes a tiny world of its own; leave out --demo, or --quick")
    if not (world / "sft" / "final").is_dir():
        fit_reference(world, seed=0, **scale.sizes)
    judge = Judge(world, scale)
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


class Judge:
    """Samples and judges a model's answers to the world's unseen prompts, `scale.samples` to each."""

    def __init__(self, world: Path, scale: Scale) -> None:
        directory = world / "sft" / "final"
        self.prompts, self.scale = unseen_prompts(world), scale
        self.tokenizer, self.reference = Tokenizer.from_directory(directory), load_model(directory)
        self.ids = [self.tokenizer.encode(prompt) for prompt in self.prompts]
        # What every number depends on but for the run itself.
        self.identity = {
            "reference": model_fingerprint(directory),
            "prompts": fingerprint(*self.prompts),
            "samples": [scale.samples, scale.best_samples],
        }

    def point(self, model: Transformer, step: int) -> Point:
        drawn = [answer(model, self.tokenizer, self.prompts, seed) for seed in range(self.scale.samples)]
        apart = [divergences(model, self.reference, self.ids, answers.tokens) for answers in drawn]
        columns = (
            torch.tensor([[j.reward for j in answers.judgements] for answers in drawn]),
            torch.stack([each.token_kls for each in apart]),
            torch.stack([each.log_ratios for each in apart]),
        )
        measured = [number for column in columns for number in mean_and_error(column)]
        length = torch.tensor([[float(j.length) for j in answers.judgements] for answers in drawn])
        return Point(step, *measured, length.mean().item())

    def best(self) -> dict[str, list[float]]:
        """What no policy can beat: see `best_reachable`, from answers of the reference."""
        seeds = range(1000, 1000 + self.scale.best_samples)  # others than those of its own point
        rewards = [
            [j.reward for j in answer(self.reference, self.tokenizer, self.prompts, seed).judgements]
            for seed in seeds
        ]
        return best_reachable(torch.tensor(rewards, dtype=torch.float64).T)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """values (samples, prompts) -> mean, and its standard error over prompts."""
    by_prompt = values.double().mean(0)
    return by_prompt.mean().item(), (by_prompt.std() / math.sqrt(len(by_prompt))).item()


def best_reachable(rewards: Tensor) -> dict[str, list[float]]:
    """The most reward that a KL buys, by reweighting the reference's own answers: rewards (prompts, samples), nats.

        pi*(y|x) = pi_ref(y|x) exp(r*(x, y) / tau) / Z(x)        has the most reward of all policies with its KL

    Each of S answers to a prompt gets the weight w = softmax(r* / tau); then reward = sum w r* and KL = sum w log(S w).
    tau goes down as long as the weights rest on 4 answers or more in the mean, 1 / sum w^2; beyond, few answers say
    little. Returns {"tau": [...], "kl": [...], "reward": [...]}.
    """
    curve: dict[str, list[float]] = {"tau": [], "kl": [], "reward": []}
    for tau in torch.logspace(2, -1, 61).tolist():
        logs = (rewards / tau).log_softmax(1)
        weights = logs.exp()
        if (1 / (weights**2).sum(1)).mean() < min(4, rewards.shape[1] / 2):
            break
        curve["tau"].append(tau)
        curve["kl"].append((weights * (logs + math.log(rewards.shape[1]))).sum(1).mean().item())
        curve["reward"].append((weights * rewards).sum(1).mean().item())
    return curve


def run(setting: Setting, out: Path, world: Path, scale: Scale, judge: Judge) -> list[Point]:
    """Train with one setting by the ordinary script, and judge its checkpoints: a point each."""
    directory = out / setting.name
    settings = within(world, FROM_SFT) | SAME_FOR_ALL | {"run.save_every": str(scale.every)}
    settings |= {"loss.beta": str(setting.beta)}
    if setting.gamma is not None:
        settings["loss.gamma"] = str(setting.gamma)

    def points() -> list[dict[str, float]]:
        reference = (
            out / "reference.safetensors"
        )  # its log-probs are the same for all; the script checks that
        if reference.exists() and not (directory / reference.name).exists():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(reference, directory / reference.name)
        run_script(
            "train_dpo.py", f"configs/demo_{setting.loss}.toml", settings | {"run.out": str(directory)}
        )
        if not (directory / "final").is_dir():
            raise UserError(f"{directory}: stopped before its end; the same command goes on from there")
        if not reference.exists() and (directory / reference.name).exists():
            shutil.copyfile(directory / reference.name, reference)
        steps = sorted(int(path.name[5:]) for path in (directory / "checkpoints").glob("step-*"))
        if steps[0] > scale.every:
            raise UserError(f"{directory}: its early checkpoints are gone; delete it, to train it again")
        print(f"judging {setting.name} at steps {', '.join(map(str, steps))}", flush=True)
        return [judge.point(load_model(checkpoint(directory, s)), s)._asdict() for s in steps]

    found = cached(directory / "points.json", judge.identity | {"settings": settings}, points)
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
