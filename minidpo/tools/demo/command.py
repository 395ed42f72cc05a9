"""`python -m minidpo demo`: from nothing to an aligned model in a world whose true reward is known.

1. Write the world (world.py, files.py): dialogues, a tokenizer and a random model.
2. SFT on responses of mixed quality gives the reference, which has learnt their faults as well.
3. A reward model is trained on noisy preferences, and compared with the best accuracy that the noise allows.
4. DPO is trained on the same preferences.
5. Both models respond to unseen prompts (samples.py), the table says what changed, and report.html shows it.
Steps 2 to 4 are the ordinary scripts with ordinary files; each command is printed before it runs.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minidpo.data import read_preferences
from minidpo.errors import STOPPED, UNREAD, UserError
from minidpo.files import writing
from minidpo.log import aligned, read_metrics
from minidpo.model import load_model
from minidpo.tools.demo.files import write_model, write_world
from minidpo.tools.demo.samples import Samples, UnseenPrompts
from minidpo.tools.demo.world import Judgement, ceiling_accuracy
from minidpo.tools.report import main as write_page

REPOSITORY = Path(__file__).resolve().parents[3]  # The scripts and configs lie there.
OUT = Path("runs/demo")  # the directory that the configs name
EXAMPLES = 3


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo demo", description=about)
    option = parser.add_argument
    option("--out", metavar="DIR", type=Path, default=OUT, help=f"where files are written (default: {OUT})")
    option("--seed", type=int, default=0, help="of the world and of the first weights")
    judge_help = "train nothing: the table for these runs from the demo's SFT"
    option("--judge", metavar="RUN", nargs="+", type=Path, help=judge_help)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # As in the configs: the figures do not depend on how many processors there are.
    out: Path = options.out
    if options.judge:
        compare(UnseenPrompts(out), options.judge)
        return
    started = time.monotonic()
    fit_reference(out, options.seed)
    train("train_rm.py", "rm", out, from_sft(out))
    train("train_dpo.py", "dpo", out, from_sft(out))
    report(out)
    write_page([*(f"{out}/{name}" for name in ("dpo", "rm", "sft")), "--out", f"{out}/report.html"])
    print(f"\n{time.monotonic() - started:.0f} s in all; everything lies in {out}.")
    print(f"See what changed, token by token: open {out}/report.html in a browser.")


# --- training -----------------------------------------------------------------------------------------------


def fit_reference(out: Path, seed: int, **sizes: int) -> None:
    """Write the world of `seed` and its random model to `out`, and train OUT/sft, where all other runs start.

    sizes: of the world, see `write_world`.
    """
    if not (REPOSITORY / "configs").exists():
        raise UserError(f"{REPOSITORY / 'configs'} is missing; run this from a clone, after pip install -e .")
    seed_file = out / "seed"
    if seed_file.exists() and (written := seed_file.read_text().strip()) != str(seed):
        raise UserError(
            f"--seed {seed}: {out} has the world of seed {written}; give another --out, or delete it"
        )
    print(f"Writing a world of questions and answers, and a random model, to {out}")
    with writing(out):
        write_world(out, seed, **sizes)
        write_model(out / "base", out, seed)
        seed_file.write_text(f"{seed}\n")
    train("train_dpo.py", "sft", out, {"model.path": f"{out}/base", "data.train": f"{out}/sft.jsonl.gz"})


def from_sft(out: Path) -> dict[str, str]:
    """The settings of a run that starts from the SFT model in `out` and trains on the preferences there."""
    return {
        "model.path": f"{out}/sft/final",
        "data.train": f"{out}/preferences.train.jsonl.gz",
        "data.eval": f"{out}/preferences.test.jsonl.gz",
    }


def train(script: str, name: str, out: Path, settings: dict[str, str]) -> None:
    """Run one script on configs/demo_NAME.toml, which has `settings` already if `out` is OUT."""
    settings = {} if out == OUT else settings | {"run.out": f"{out}/{name}"}
    run_script(script, f"configs/demo_{name}.toml", settings)


def run_script(script: str, config: str, settings: dict[str, str]) -> None:
    """Print the command and run it in the current directory, as if it had been typed there."""
    overrides = [f"--{key}={value}" for key, value in settings.items()]
    command = shlex.join(["python", script, config, *overrides])
    print(f"\n$ {command}", flush=True)
    process = subprocess.Popen([sys.executable, REPOSITORY / script, REPOSITORY / config, *overrides])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # The script received Ctrl-C as well, and needs a moment to save.
        raise
    if status in (STOPPED, UNREAD):
        sys.exit(status)
    if status:
        raise UserError(f"{command} ended with exit status {status}, see above")


# --- what came of it ----------------------------------------------------------------------------------------


def report(out: Path) -> None:
    """Print the table, the held-out figures and a few examples."""
    expected, realised = ceiling_accuracy(read_preferences(out / "preferences.test.jsonl.gz"))
    reward_model, aligned_model = last_evaluation(out / "rm"), last_evaluation(out / "dpo")
    unseen = UnseenPrompts(out)
    before, after = compare(unseen, [out / "dpo"])
    print("\nOn held-out preferences:\n")
    print(f"  reward model accuracy   {reward_model['eval/accuracy']:.3f}")
    print(
        f"  accuracy of r* itself   {realised:.3f}  (expected before the labels were drawn: {expected:.3f})"
    )
    print(f"  DPO accuracy            {aligned_model['eval/rewards/accuracies']:.3f}")
    print(f"  DPO margin, nats        {aligned_model['eval/rewards/margins']:.2f}")
    # The prompts come in random order, so the first ones are as good a choice as any.
    examples = list(zip(unseen.prompts, before.texts, after.texts, strict=True))[:EXAMPLES]
    for prompt, first, then in examples:
        print(f"\n{prompt.strip()}\n  before: {first.strip()}\n  after:  {then.strip()}")


def compare(unseen: UnseenPrompts, runs: Sequence[Path]) -> list[Samples]:
    """Print how the SFT model and the final models of `runs` respond; returns their samples, SFT's first."""
    models = [unseen.reference, *(load_model(run / "final") for run in runs)]
    samples = [unseen.sample(model) for model in models]
    kls = [unseen.kl(model, drawn) for model, drawn in zip(models, samples, strict=True)]

    def mean(value: Callable[[Judgement], float]) -> list[float]:
        return [sum(map(value, drawn.judgements)) / len(drawn.judgements) for drawn in samples]

    rows = {
        "  correct, %": mean(lambda j: 100 * j.correct),
        "  courteous, %": mean(lambda j: 100 * j.courteous),
        "  correct and courteous, %": mean(lambda j: 100 * (j.correct and j.courteous)),
        "  length, words": mean(lambda j: j.length),
        "  true reward r*, nats": mean(lambda j: j.reward),
        "  KL from the SFT model, nats": [kl.mean() for kl in kls],
        "    of the response with the largest": [kl.max() for kl in kls],
    }
    header = ["", "SFT", *(run.name.upper() for run in runs)]
    cells = [[label, *(f"{value:.1f}" for value in values)] for label, values in rows.items()]
    print(f"\nOn {len(unseen.prompts)} unseen prompts, one response sampled for each:\n")
    print(aligned([header, *cells]))
    return samples


def last_evaluation(run: Path) -> dict[str, float]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "eval/loss" in line][-1]
