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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from minidpo.commands.world import Judgement, ceiling_accuracy, judge
from minidpo.commands.world_files import write_model, write_world
from minidpo.data import read_preferences
from minidpo.errors import UserError
from minidpo.files import writing
from minidpo.generate import Sampling, generate
from minidpo.logprobs import sequence_logps
from minidpo.model import Transformer
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model

ROOT = Path(__file__).resolve().parents[2]  # of the repository: the scripts and configs lie there
OUT = "runs/demo"  # what the configs say
LONGEST_ANSWER = 40  # tokens; the longest in the data has about 25
EXAMPLES = 3


class Answers(NamedTuple):
    """One sampled answer a prompt."""

    texts: list[str]
    tokens: list[list[int]]  # EOS included, where there is one
    judgements: list[Judgement]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo demo", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", metavar="DIR", default=OUT, help=f"where everything is written (default: {OUT})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the first weights")
    options = parser.parse_args(arguments)
    for script in ("train_dpo.py", "train_rm.py", "configs"):
        if not (ROOT / script).exists():
            raise UserError(
                f"{ROOT / script} is not there; run the demo from a clone installed with pip install -e ."
            )
    started = time.monotonic()
    out = Path(options.out)
    seed_file = out / "seed"
    if seed_file.exists() and seed_file.read_text().strip() != str(options.seed):
        raise UserError(
            f"--seed {options.seed}: {out} holds the world of seed {seed_file.read_text().strip()}, and runs on it;"
            " give another --out, or delete it"
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        seed_file.write_text(f"{options.seed}\n")

    print(f"Writing a world of questions and answers, and a random model, to {out}")
    write_world(out, options.seed)
    write_model(out / "base", out, options.seed)
    train("train_dpo.py", "sft", out, {"model.path": "base", "data.train": ["sft.jsonl.gz"]})
    preferences = {"data.train": ["preferences.train.jsonl.gz"], "data.eval": ["preferences.test.jsonl.gz"]}
    train("train_rm.py", "rm", out, {"model.path": "sft/final"} | preferences)
    train("train_dpo.py", "dpo", out, {"model.path": "sft/final"} | preferences)
    report(out)
    print(f"\n{time.monotonic() - started:.0f} s in all; everything lies in {out}.")
    if out == Path(OUT):
        print("Next: python train_dpo.py configs/demo_ipo.toml")


def train(script: str, name: str, out: Path, paths: dict[str, str | list[str]]) -> None:
    """Run one script on configs/demo_NAME.toml. `paths` within `out` are given where it is not OUT."""
    command = [script, f"configs/demo_{name}.toml"]
    if out != Path(OUT):
        inside = {
            key: str(out / value) if isinstance(value, str) else ",".join(str(out / file) for file in value)
            for key, value in paths.items()
        }
        command += [f"--{key}={value}" for key, value in (inside | {"run.out": str(out / name)}).items()]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    # In the caller's directory, as if the printed command had been typed there.
    files = [str(ROOT / command[0]), str(ROOT / command[1])]
    finished = subprocess.run([sys.executable, *files, *command[2:]])
    if finished.returncode:
        raise UserError(
            f"python {shlex.join(command)} ended with exit status {finished.returncode}, see above"
        )


# --- what came of it ----------------------------------------------------------------------------------------


def report(out: Path) -> None:
    """The table and the examples."""
    ceiling = ceiling_accuracy(read_preferences(out / "preferences.test.jsonl.gz"))
    reward_model, aligned = held_out(out / "rm"), held_out(out / "dpo")
    prompts = [json.loads(line)["prompt"] for line in (out / "prompts.test.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.from_directory(out / "sft" / "final")
    reference, policy = load_model(out / "sft" / "final"), load_model(out / "dpo" / "final")
    before, after = answer(reference, tokenizer, prompts), answer(policy, tokenizer, prompts)
    kl = kl_from_samples(policy, reference, [tokenizer.encode(prompt) for prompt in prompts], after.tokens)

    print(f"\nOn {len(prompts)} unseen prompts, one answer sampled to each:\n")
    print(f"  {'':<36} {'SFT':>8} {'DPO':>8}")
    rows: list[tuple[str, str, Callable[[Judgement], float]]] = [
        ("correct", "%", lambda j: 100 * j.correct),
        ("courteous", "%", lambda j: 100 * j.courteous),
        ("correct and courteous", "%", lambda j: 100 * (j.correct and j.courteous)),
        ("length", "words", lambda j: j.length),
        ("true reward r*", "nats", lambda j: j.reward),
    ]
    for label, unit, value in rows:
        means = [sum(map(value, answers.judgements)) / len(prompts) for answers in (before, after)]
        print(f"  {label + ', ' + unit:<36} {means[0]:>8.1f} {means[1]:>8.1f}")
    print(f"  {'KL from the SFT model, nats':<36} {0:>8.1f} {kl:>8.1f}")
    print("\nOn held-out preferences:\n")
    print(f"  reward model accuracy   {reward_model['eval/accuracy']:.3f}")
    print(
        f"  r* itself, the ceiling  {ceiling.realised:.3f}  ({ceiling.expected:.3f} expected of such labels)"
    )
    print(f"  DPO accuracy            {aligned['eval/rewards/accuracies']:.3f}")
    print(f"  DPO margin, nats        {aligned['eval/rewards/margins']:.2f}")
    # The prompts come in random order, so the first ones are as good a choice as any.
    for prompt, first, then in list(zip(prompts, before.texts, after.texts, strict=True))[:EXAMPLES]:
        print(f"\n{prompt.strip()}\n  before: {first.strip()}\n  after:  {then.strip()}")


def held_out(run: Path) -> dict[str, float]:
    """The last evaluation in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    if not evaluations:
        raise UserError(f"{run / 'metrics.jsonl'} has no evaluation; delete {run} and run the demo again")
    return evaluations[-1]


def answer(model: Transformer, tokenizer: Tokenizer, prompts: list[str]) -> Answers:
    """Sample one answer a prompt, at temperature 1 because KL is about that distribution, and judge it."""
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    tokens = generate(model, ids, Sampling(max_new_tokens=LONGEST_ANSWER), tokenizer.eos_id, seed=0)
    ended = [row[:-1] if row[-1] == tokenizer.eos_id else row for row in tokens]
    texts = [tokenizer.decode(row) for row in ended]
    return Answers(texts, tokens, [judge(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])


@torch.no_grad()
def kl_from_samples(
    policy: Transformer, reference: Transformer, prompts: list[list[int]], samples: list[list[int]]
) -> float:
    """KL(policy || reference) a response, nats: mean of log pi(y) - log pi_ref(y) over its samples y."""
    width = max(len(prompt) + len(sample) for prompt, sample in zip(prompts, samples, strict=True))
    tokens = torch.zeros(len(prompts), width, dtype=torch.long)  # (R, T), padded on the right
    scored = torch.zeros(len(prompts), width, dtype=torch.bool)  # (R, T)
    for i, (prompt, sample) in enumerate(zip(prompts, samples, strict=True)):
        tokens[i, : len(prompt) + len(sample)] = torch.tensor([*prompt, *sample])
        scored[i, len(prompt) : len(prompt) + len(sample)] = True
    policy_logps, reference_logps = (
        sequence_logps(model(tokens), tokens, scored)[0] for model in (policy, reference)
    )
    return (policy_logps - reference_logps).mean().item()
