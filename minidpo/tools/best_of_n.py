"""Best of n: several samples per prompt, ranked by a reward model; best and worst may make a preference pair.

Moving from the policy to its best of n costs at most log n - (n-1)/n nats of KL (Beirami et al. 2024, who
prove the bound for what Stiennon et al. 2020 gave as the value).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidpo.data import Prompt
from minidpo.errors import UserError
from minidpo.files import write_json_lines
from minidpo.log import print0
from minidpo.training.reward_scorer import with_error


class Sample(NamedTuple):
    """One response. ended: whether the model closed it with EOS, or max_new_tokens cut it off."""

    prompt: Prompt
    text: str
    ended: bool
    reward: float = math.nan  # what `score --reward-model` gives it; NaN without a reward model


def best_and_worst(samples: Sequence[Sample]) -> tuple[Sample, Sample] | None:
    """The pair that one prompt's samples make: highest and lowest reward. None if there is nothing to prefer.

    Blank samples are left out, because no reader takes a blank response. If all rewards are tied, best and
    worst are both the first; equal texts have equal rewards but for rounding.
    """
    spoken = [sample for sample in samples if sample.text.strip()]
    if not spoken:
        return None
    best, worst = (choose(spoken, key=lambda sample: sample.reward) for choose in (max, min))
    return None if best.text == worst.text else (best, worst)


def write_samples(path: Path, prompts: Sequence[Sequence[Sample]]) -> None:
    """One JSON line per sample. prompt_index is the record's number in its file, prompt text or messages."""
    rows = []
    for samples in prompts:
        for k, (prompt, text, ended, reward) in enumerate(samples):
            row: dict[str, Any] = {"prompt_index": prompt.index, "sample": k}
            row |= {"prompt": prompt.messages or prompt.text, "text": text, "ended": ended}
            if not math.isnan(reward):
                row |= {"reward": reward, "best": samples[k] is _best(samples)}
            rows.append(row)
    write_json_lines(path, rows)
    print0(f"{len(rows)} samples written to {path}")


def write_pairs(path: Path, prompts: Sequence[Sequence[Sample]]) -> None:
    """A preference file of best and worst, in text or messages as the prompts were, with their scores."""
    pairs = [pair for samples in prompts if (pair := best_and_worst(samples))]
    if not pairs:
        raise UserError(f"--pairs-out {path}: no prompt's samples differ in reward; raise --n, --temperature")
    rows = []
    for pair in pairs:
        prompt, others = pair[0].prompt, dict(pair[0].prompt.given)
        row: dict[str, Any] = {"prompt": prompt.messages or prompt.text}
        if tools := others.pop("tools", None):
            row["tools"] = tools
        if others:
            row["chat_template_kwargs"] = others
        for name, sample in zip(("chosen", "rejected"), pair, strict=True):
            turn = [{"role": "assistant", "content": sample.text}]
            row |= {name: turn if prompt.messages else sample.text, f"score_{name}": sample.reward}
        rows.append(row)
    write_json_lines(path, rows)
    skipped = f"{len(prompts) - len(pairs)} prompts skipped, whose samples are all equal, tied or blank"
    print0(f"{len(pairs)} pairs of best and worst written to {path}; {skipped}")
    if cut := sum(not sample.ended for pair in pairs for sample in pair):
        were = f"{cut} of their {2 * len(pairs)} responses were cut off"
        print0(f"warning: {were}, and training would put an EOS there; raise --max-new-tokens")


def show_all(prompts: Sequence[Sequence[Sample]]) -> None:
    """Every sample, under a heading where there are several."""
    for samples in prompts:
        for k, sample in enumerate(samples):
            if len(prompts) * len(samples) > 1:
                print0(f"--- {_named(sample.prompt)}, sample {k}")
            print0(sample.text)


def show_best(prompts: Sequence[Sequence[Sample]]) -> None:
    """The best sample of every prompt, then what choosing came to."""
    n = len(prompts[0])
    rewards = np.array([[sample.reward for sample in samples] for samples in prompts])  # (prompts, n)
    for samples, its in zip(prompts, rewards, strict=True):
        best, mean, worst = its.max(), its.mean(), its.min()
        named = _named(samples[0].prompt)
        print0(f"--- {named}, best of {n}: reward {best:.4f} (mean {mean:.4f}, worst {worst:.4f})")
        print0(_best(samples).text)
    every, top = (with_error(per_prompt, ".4f") for per_prompt in (rewards.mean(axis=1), rewards.max(axis=1)))
    print0(f"--- {len(prompts)} prompts, {n} samples each; mean ± standard error over prompts")
    print0(f"reward of a sample {every}, of the best of {n} {top}")
    bound = math.log(n) - (n - 1) / n
    print0(f"KL of the best of {n} from the model: at most log n - (n-1)/n = {bound:.4f} nats per prompt")
    if cut := sum(not sample.ended for samples in prompts for sample in samples):
        were = f"{cut} of {rewards.size} samples were cut off at --max-new-tokens"
        print0(f"{were}, and are scored as if they ended there")


def _named(prompt: Prompt) -> str:
    """Its record's number in the file, and the end of what was asked."""
    asked = prompt.messages[-1].get("content") or "" if prompt.messages else prompt.text
    return f"prompt {prompt.index} ({'...' * (len(asked) > 60)}{asked[-60:]!r})"


def _best(samples: Sequence[Sample]) -> Sample:
    return max(samples, key=lambda sample: sample.reward)
