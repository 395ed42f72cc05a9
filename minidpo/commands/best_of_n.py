"""Best of n: several samples a prompt, ranked by a reward model; the best is kept, or best and worst make a pair.

    sample         one completion, and what the reward model gives it: what `score --reward-model` would
    best, worst    of one prompt's samples, by reward

Moving from the policy to its best of n costs at most log n - (n-1)/n nats of KL (Beirami et al. 2024, who prove the
bound for what Stiennon et al. 2020 gave as the value).
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidpo.chat import Message
from minidpo.errors import UserError
from minidpo.files import replacing_file, writing
from minidpo.formats import Prompt
from minidpo.judge import mean_and_error
from minidpo.metrics import say


@dataclass(frozen=True)
class Sample:
    """One completion. ended: whether the model closed it with EOS, or max_new_tokens cut it off."""

    prompt: Prompt
    text: str
    ended: bool
    reward: float = math.nan


def best_and_worst(samples: Sequence[Sample]) -> tuple[Sample, Sample] | None:
    """The pair that one prompt's samples make: highest and lowest reward. None where there is nothing to prefer.

    Blank samples stand back, for no reader takes a blank ending. Where all rewards are tied, best and worst are both
    the first; equal texts have equal rewards but for rounding.
    """
    spoken = [sample for sample in samples if sample.text.strip()]
    if not spoken:
        return None
    best, worst = (choose(spoken, key=lambda sample: sample.reward) for choose in (max, min))
    return None if best.text == worst.text else (best, worst)


def write_samples(path: Path, prompts: Sequence[Sequence[Sample]]) -> None:
    """One JSON line a sample: prompt_index, sample, prompt (text, or messages), text, ended; where there was a reward
    model, reward and best."""

    def row(p: int, k: int, sample: Sample) -> dict:
        judged = not math.isnan(sample.reward)
        return (
            {"prompt_index": p, "sample": k}
            | {
                "prompt": sample.prompt.messages or sample.prompt.text,
                "text": sample.text,
                "ended": sample.ended,
            }
            | ({"reward": sample.reward, "best": k == _best(prompts[p])} if judged else {})
        )

    _write(path, (row(p, k, sample) for p, samples in enumerate(prompts) for k, sample in enumerate(samples)))
    say(f"{sum(map(len, prompts))} samples written to {path}")


def write_pairs(path: Path, prompts: Sequence[Sequence[Sample]]) -> None:
    """A preference file of best and worst, in text or messages as the prompts were, with their scores."""
    pairs = [pair for samples in prompts if (pair := best_and_worst(samples))]
    if not pairs:
        raise UserError(f"--pairs-out {path}: no prompt has two samples of different reward; raise --n")
    _write(
        path,
        (
            {
                "prompt": best.prompt.messages or best.prompt.text,
                "chosen": _ending(best),
                "rejected": _ending(worst),
                "score_chosen": best.reward,
                "score_rejected": worst.reward,
            }
            for best, worst in pairs
        ),
    )
    say(
        f"{len(pairs)} pairs of best and worst written to {path}; {len(prompts) - len(pairs)} prompts skipped,"
        " whose samples are all equal, tied or blank"
    )
    if cut := sum(not sample.ended for pair in pairs for sample in pair):
        say(
            f"warning: {cut} of their {2 * len(pairs)} endings were cut off, and training would put an EOS there; raise"
            " --max-new-tokens"
        )


def show_all(prompts: Sequence[Sequence[Sample]]) -> None:
    """Every sample, under a heading where there are several."""
    for p, samples in enumerate(prompts):
        for k, sample in enumerate(samples):
            if len(prompts) * len(samples) > 1:
                say(f"--- prompt {p}, sample {k}")
            say(sample.text)


def show_best(prompts: Sequence[Sequence[Sample]]) -> None:
    """The best sample of every prompt, then what choosing came to."""
    n = len(prompts[0])
    for p, samples in enumerate(prompts):
        rewards = [sample.reward for sample in samples]
        best = samples[_best(samples)]
        say(
            f"--- prompt {p}, best of {n}: reward {best.reward:.4f} (mean {np.mean(rewards):.4f}, worst {min(rewards):.4f})"
        )
        say(best.text)
    table = np.array([[sample.reward for sample in samples] for samples in prompts])
    (every, every_error), (top, top_error) = map(mean_and_error, (table.mean(axis=1), table.max(axis=1)))
    cut = sum(not sample.ended for samples in prompts for sample in samples)
    say(f"--- {len(prompts)} prompts, {n} samples each; mean ± standard error over prompts")
    say(f"reward of a sample {every:.4f} ± {every_error:.4f}, of the best of {n} {top:.4f} ± {top_error:.4f}")
    say(
        f"KL of the best of {n} from the model: at most log n - (n-1)/n = {math.log(n) - (n - 1) / n:.4f} nats a prompt"
    )
    if cut:
        say(
            f"{cut} of {table.size} samples were cut off at --max-new-tokens, and are scored as if they ended there"
        )


def _ending(sample: Sample) -> str | list[Message]:
    return [{"role": "assistant", "content": sample.text}] if sample.prompt.messages else sample.text


def _best(samples: Sequence[Sample]) -> int:
    return max(range(len(samples)), key=lambda k: samples[k].reward)


def _write(path: Path, rows: Iterator[dict]) -> None:
    with writing(path), replacing_file(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
