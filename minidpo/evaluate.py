"""What the policy says by itself: sampled responses to held-out prompts, beside those of the reference.

A loss and an accuracy tell how the policy ranks other people's responses, not what it writes. Of y sampled from pi,
two estimates of KL(pi || pi_ref), in nats a response, both unbiased:

    of log-ratios   sum_t d_t,   d_t = log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)
    of next tokens  sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))       the chain rule of KL

The second sums over all that the next token could have been and leaves only the prefix to chance: never negative and far
less noise. (Schulman's exp(-d) - 1 + d is never negative either, but at several nats the tokens that carry its mean are
hardly ever sampled, and it reads low.) A response cut at max_new_tokens counts as far as it went.
"""

import gc
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.dataset import longest_pair, prompt_keys
from minidpo.device import autocast
from minidpo.distributed import gathered, rank, ranks
from minidpo.errors import UserError
from minidpo.files import replacing_file, writing
from minidpo.generate import Sampling, generate
from minidpo.judge import MICRO_TOKENS, Judge, mean_and_error, text_after
from minidpo.logprobs import at_least_float32, chunk_rows, scored_hidden, sum_by_ending
from minidpo.metrics import Progress
from minidpo.model import Transformer
from minidpo.packing import PackedRow, PairTokens, Wanted
from minidpo.reference import load_reference, of_every_pair
from minidpo.sections import PreferenceConfig
from minidpo.tokenizer import Tokenizer, TokenPair


@dataclass(frozen=True)
class Samples:
    """One response a prompt, what was sampled and what the judge gave it (None without a judge)."""

    ids: list[list[int]]
    texts: list[str]
    ended: np.ndarray  # bool: closed with EOS, not cut off
    rewards: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens, EOS included."""
        return np.array([len(ids) for ids in self.ids])


class SampledEvaluation:
    """Samples from policy and reference to the same held-out prompts, at temperature 1: each evaluation's figures.

    Raises UserError where a prompt leaves no room for max_new_tokens in the policy or the reward model.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        held_out: PairTokens,
        tokenizer: Tokenizer,
        policy: Transformer,
        device: torch.device,
    ) -> None:
        section, run = config.eval, config.run
        self._tokenizer, self._device = tokenizer, device
        self._reference_path, self._out = config.reference_path, Path(run.out)
        self._dtype, self._seed = run.dtype, run.seed
        self._sampling = Sampling(section.max_new_tokens)
        self._judge = Judge(section.reward_model, device) if section.reward_model else None
        if self._judge and config.data.template != "model":
            self._judge.compare_template(tokenizer.chat_template(config.data.template))
        first = dict(zip(reversed(prompt_keys(held_out)), reversed(range(len(held_out))), strict=True))
        rows = sorted(first.values())[: section.samples]  # each prompt once
        self._prompts = [held_out.ids[start:end].tolist() for start, end in held_out.bounds[rows, :2]]
        self._as_text = [tokenizer.prompt(ids) for ids in self._prompts]
        self._require_room(policy.config.max_length)
        self._of_reference: Samples | None = None

    def __call__(self, policy: Transformer, step: int) -> dict[str, float]:
        """Figures of this step, under names without "eval/"; the samples go to OUT/samples/step-N.jsonl."""
        # Read anew each time: between evaluations its memory is the policy's.
        reference = load_reference(self._reference_path, self._device, self._dtype)
        if self._of_reference is None:
            self._of_reference = self._sample(reference, self._seed, "sampling, reference")
        base = self._of_reference
        compare = partial(
            divergences, policy, reference, self._prompts, device=self._device, dtype=self._dtype
        )
        samples, divergence = base, compare(base.ids) if step == 0 else None
        # With the seed of the reference's: while the two are equal, so are their samples.
        if divergence is None or divergence.any():
            samples = self._sample(policy, self._seed, "sampling")
            divergence = compare(samples.ids)
        del reference, compare
        gc.collect()  # sharded layers stand in reference cycles, and would stay beside the policy
        kl, kl_error = mean_and_error(divergence[:, 1])
        figures = {
            "kl": kl,
            "kl_standard_error": kl_error,
            "kl_of_worst": float(divergence[:, 1].max()),
            "kl_per_token": float(divergence[:, 1].sum() / samples.lengths.sum()),
            "kl_of_log_ratios": float(divergence[:, 0].mean()),
            "sample_length": float(samples.lengths.mean()),
            "sample_length_change": float(samples.lengths.mean() - base.lengths.mean()),
            "ended": float(samples.ended.mean()),
            "distinct_1": distinct(samples.ids, 1),
            "distinct_2": distinct(samples.ids, 2),
        }
        if samples.rewards is not None and base.rewards is not None:
            figures["reward"], figures["reward_standard_error"] = mean_and_error(samples.rewards)
            figures["reward_of_reference"] = float(base.rewards.mean())
            figures["win_rate"] = float((samples.rewards > base.rewards).mean())
            figures["tie_rate"] = float((samples.rewards == base.rewards).mean())
        self._write(step, samples, divergence)
        return figures

    def _sample(self, model: Transformer, seed: int, label: str) -> Samples:
        """Each rank samples its share, as many prompts as the others: sharded layers are gathered by all together."""
        each = -(-len(self._prompts) // ranks())
        own = [self._prompts[i % len(self._prompts)] for i in range(rank() * each, (rank() + 1) * each)]
        progress = Progress(label, len(own), "responses")
        with autocast(self._device, self._dtype):
            drawn = generate(
                model, own, self._sampling, self._tokenizer.eos_id, seed + rank(), progress=progress.advance
            )
        progress.clear()
        ids = [row for part in gathered(drawn) for row in part][: len(self._prompts)]
        texts = [text_after(self._tokenizer, *both) for both in zip(self._prompts, ids, strict=True)]
        rewards = np.array(self._judge.rewards(self._as_text, texts)) if self._judge else None
        ended = np.array([row[-1] == self._tokenizer.eos_id for row in ids])
        return Samples(ids, texts, ended, rewards)

    def _write(self, step: int, samples: Samples, divergence: np.ndarray) -> None:
        if rank():
            return
        file = self._out / "samples" / f"step-{step}.jsonl"
        rows = []
        for i, text in enumerate(samples.texts):
            row = {"prompt": self._as_text[i].text, "response": text, "tokens": len(samples.ids[i])}
            row |= {"ended": bool(samples.ended[i]), "log_ratio": float(divergence[i, 0])}
            if samples.rewards is not None:
                row["reward"] = float(samples.rewards[i])
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            with replacing_file(file) as temporary:
                temporary.write_text("".join(rows), encoding="utf-8")

    def _require_room(self, limit: int) -> None:
        new = self._sampling.max_new_tokens
        longest = max(map(len, self._prompts), default=0)
        if longest + new > limit:
            raise UserError(
                f"eval.max_new_tokens = {new} after a prompt of {longest} tokens; the model takes {limit}"
            )
        if not self._judge:
            return
        # Another tokenizer may cut the same text into more tokens.
        same = self._judge.tokenizer.identity == self._tokenizer.identity
        room = min(map(self._judge.room, self._as_text), default=limit)
        if (new + 1) * (1 if same else 2) > room:
            raise UserError(
                f"eval.max_new_tokens = {new}, but eval.reward_model takes {self._judge.max_length} tokens, and its"
                f" longest prompt leaves {room}"
            )


def divergences(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    samples: Sequence[Sequence[int]],
    device: torch.device,
    dtype: str,
) -> np.ndarray:
    """Both estimates for the policy's own `samples`: (samples, 2) nats, of log-ratios and of next tokens."""
    pairs = PairTokens.from_pairs(
        TokenPair(list(prompt), list(ids), [], i)
        for i, (prompt, ids) in enumerate(zip(prompts, samples, strict=True))
    )
    micro_tokens = max(MICRO_TOKENS, longest_pair(pairs))
    compute = partial(divergence, policy, reference)
    return of_every_pair(compute, Wanted(chosen_logps=True), pairs, micro_tokens, device, dtype)


@torch.no_grad()
def divergence(policy: Transformer, reference: Transformer, row: PackedRow) -> Tensor:
    """Both estimates for the chosen endings of a packed row: (B, 2)."""
    ours, theirs = scored_hidden(policy, row), scored_hidden(reference, row)  # (S, D) each
    ratios, kls = [torch.zeros(0, device=ours.device)], [torch.zeros(0, device=ours.device)]
    rows = chunk_rows(policy.config.vocab_size, torch.float32)
    for h, h_reference, target in zip(
        ours.split(rows), theirs.split(rows), row.targets.split(rows), strict=True
    ):
        logps = at_least_float32(F.linear(h, policy.output_weight)).log_softmax(-1)  # (chunk, V)
        logratios = logps - at_least_float32(F.linear(h_reference, reference.output_weight)).log_softmax(-1)
        ratios.append(logratios.gather(-1, target[:, None]).squeeze(-1))
        kls.append((logps.exp() * logratios).sum(-1))
    each = (torch.cat(ratios).double(), torch.cat(kls).double())
    return torch.stack([sum_by_ending(values, row.scored_lengths) for values in each], dim=1)


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of the responses' tokens: low where a policy repeats itself (Li et al. 2016)."""
    counts = Counter(tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1))
    return len(counts) / max(1, sum(counts.values()))
