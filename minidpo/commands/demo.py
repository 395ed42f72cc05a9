"""`python -m minidpo demo`: from nothing to an aligned model in a world whose true reward is known.

1. write the world (minidpo/commands/world.py): dialogues, a tokenizer, a random model
2. SFT on answers of mixed quality: the reference, which answers as its teachers did
3. a reward model on noisy preferences, to be held against the best accuracy that the noise allows
4. DPO on the same preferences
5. sample both models on unseen prompts, judge the answers by rule, print what changed
Steps 2 to 4 are the ordinary scripts with ordinary files; each command is printed before it runs.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from minidpo.advice import APART
from minidpo.commands.answers import Answers, answer
from minidpo.commands.world import Judgement, ceiling_accuracy
from minidpo.commands.world_files import write_model, write_world
from minidpo.data import read_preferences
from minidpo.errors import STOPPED, UserError
from minidpo.evaluate import divergences
from minidpo.files import require_file, writing
from minidpo.metrics import read_metrics
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model

ROOT = Path(__file__).resolve().parents[2]  # of the repository: the scripts and configs lie there
OUT = "runs/demo"  # what the configs say
EXAMPLES = 3
FROM_SFT: dict[str, str | list[str]] = {
    "model.path": "sft/final",
    "data.train": ["preferences.train.jsonl.gz"],
    "data.eval": ["preferences.test.jsonl.gz"],
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", metavar="DIR", default=OUT, help=f"where everything is written (default: {OUT})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the first weights")
    parser.add_argument(
        "--judge",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="train nothing: the table for these runs from the demo's SFT",
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    out = Path(options.out)
    if options.judge:
        table(out, options.judge)
        return
    fit_reference(out, options.seed)
    train("train_rm.py", "rm", out, FROM_SFT)
    train("train_dpo.py", "dpo", out, FROM_SFT)
    report(out)
    print(f"\n{time.monotonic() - started:.0f} s in all; everything lies in {out}.")
    if out == Path(OUT):
        print("Next: python train_dpo.py configs/demo_ipo.toml")
        print("and:  python -m minidpo demo --judge runs/demo/dpo runs/demo/ipo")


def fit_reference(out: Path, seed: int, **sizes: int) -> None:
    """Write the world of `seed` and its random model to `out`, and fit OUT/sft: what all preference runs start from.

    sizes: of the world, see `write_world`.
    """
    for script in ("train_dpo.py", "train_rm.py", "configs"):
        if not (ROOT / script).exists():
            raise UserError(
                f"{ROOT / script} is not there; run this from a clone installed with pip install -e ."
            )
    seed_file = out / "seed"
    if seed_file.exists() and seed_file.read_text().strip() != str(seed):
        raise UserError(
            f"--seed {seed}: {out} holds the world of seed {seed_file.read_text().strip()}, and runs on it;"
            " give another --out, or delete it"
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        seed_file.write_text(f"{seed}\n")
    print(f"Writing a world of questions and answers, and a random model, to {out}")
    write_world(out, seed, **sizes)
    write_model(out / "base", out, seed)
    train("train_dpo.py", "sft", out, {"model.path": "base", "data.train": ["sft.jsonl.gz"]})


def train(script: str, name: str, out: Path, paths: dict[str, str | list[str]]) -> None:
    """Run one script on configs/demo_NAME.toml. `paths` within `out` are given where it is not OUT."""
    inside = within(out, paths) | {"run.out": str(out / name)} if out != Path(OUT) else {}
    run_script(script, f"configs/demo_{name}.toml", inside)


def within(out: Path, paths: dict[str, str | list[str]]) -> dict[str, str]:
    """The settings that lead to `paths` in `out`."""
    return {
        key: str(out / value) if isinstance(value, str) else ",".join(str(out / file) for file in value)
        for key, value in paths.items()
    }


def run_script(script: str, config: str, settings: dict[str, str]) -> None:
    """Print the command and run it, in the caller's directory, as if it had been typed there."""
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    command = shlex.join([script, config, *overrides])
    print(f"\n$ python {command}", flush=True)
    with subprocess.Popen([sys.executable, str(ROOT / script), str(ROOT / config), *overrides]) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # Ctrl-C reached it too: it saves, which takes a moment
            process.wait()
            sys.exit(STOPPED)
    if status == STOPPED:
        sys.exit(STOPPED)
    if status:
        raise UserError(f"python {command} ended with exit status {status}, see above")


# --- what came of it ----------------------------------------------------------------------------------------


def report(out: Path) -> None:
    """The table, held-out figures and examples."""
    ceiling = ceiling_accuracy(read_preferences(out / "preferences.test.jsonl.gz"))
    reward_model, aligned = held_out(out / "rm"), held_out(out / "dpo")
    before, after = table(out, [out / "dpo"])
    print("\nOn held-out preferences:\n")
    print(f"  reward model accuracy   {reward_model['eval/accuracy']:.3f}")
    print(
        f"  r* itself, the ceiling  {ceiling.realised:.3f}  ({ceiling.expected:.3f} expected of such labels)"
    )
    print(f"  DPO accuracy            {aligned['eval/rewards/accuracies']:.3f}")
    print(f"  DPO margin, nats        {aligned['eval/rewards/margins']:.2f}")
    # The prompts come in random order, so the first ones are as good a choice as any.
    prompts = unseen_prompts(out)
    for prompt, first, then in list(zip(prompts, before.texts, after.texts, strict=True))[:EXAMPLES]:
        print(f"\n{prompt.strip()}\n  before: {first.strip()}\n  after:  {then.strip()}")


def table(out: Path, runs: list[Path]) -> list[Answers]:
    """Print what the SFT model and the final models of `runs` answer; returns their answers, SFT's first."""
    prompts = unseen_prompts(out)
    tokenizer = Tokenizer.from_directory(out / "sft" / "final")
    reference = load_model(out / "sft" / "final")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    answers, kls = [answer(reference, tokenizer, prompts)], [np.zeros(len(prompts))]
    for run in runs:
        policy = load_model(run / "final")
        answers.append(answer(policy, tokenizer, prompts))
        of_both = divergences(policy, reference, ids, answers[-1].tokens, torch.device("cpu"), "fp32")
        kls.append(of_both[:, 1])

    def row(label: str, values: Sequence[object], form: str = "8.1f") -> None:
        width = max(8, *(len(run.name) for run in runs))
        print(f"  {label:<36}" + "".join(f" {format(value, form):>{width}}" for value in values))

    print(f"\nOn {len(prompts)} unseen prompts, one answer sampled to each:\n")
    row("", ["SFT", *(run.name.upper() for run in runs)], "")
    measures: list[tuple[str, Callable[[Judgement], float]]] = [
        ("correct, %", lambda j: 100 * j.correct),
        ("courteous, %", lambda j: 100 * j.courteous),
        ("correct and courteous, %", lambda j: 100 * (j.correct and j.courteous)),
        ("length, words", lambda j: j.length),
        ("true reward r*, nats", lambda j: j.reward),
    ]
    for label, value in measures:
        row(label, [sum(map(value, each.judgements)) / len(prompts) for each in answers])
    row("KL from the SFT model, nats", [kl.mean() for kl in kls])
    row("  of the answer that has the most", [kl.max() for kl in kls])
    for run, kl in zip(runs, kls[1:], strict=True):
        if apart := int((kl > APART).sum()):
            print(f"  {run}: {apart} of the answers fallen apart (more than {APART:g} nats); a lower optim.lr or a higher"
                  " loss.beta keeps them")  # fmt: skip
    return answers


def unseen_prompts(out: Path) -> list[str]:
    file = require_file(out / "prompts.test.jsonl", f"{out} must be a directory that the demo has written")
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


def held_out(run: Path) -> dict[str, float]:
    """The last evaluation in a run's metrics.jsonl."""
    evaluations = [
        line for line in read_metrics(run / "metrics.jsonl") if any(key.startswith("eval/") for key in line)
    ]
    if not evaluations:
        raise UserError(f"{run / 'metrics.jsonl'} has no evaluation; delete {run} and run the demo again")
    return evaluations[-1]
