"""What the policy writes by itself: sampled responses to held-out prompts, beside those of the reference.

A loss and an accuracy say how the policy ranks other people's responses, not what it writes. Of y sampled
from pi, two estimates of KL(pi || pi_ref), in nats per response, both unbiased:

    of log-ratios   sum_t d_t,   d_t = log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)
    of next tokens  sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))       the chain rule of KL

The second sums over every token that could come next and leaves only the prefix to chance, so it is never
negative and has far less noise. (Schulman's exp(-d) - 1 + d is never negative either, but at several nats the
tokens that carry its mean are hardly ever sampled, and it comes out too low.) A response cut at
max_new_tokens counts as far as it went.

All is computed in float32, whatever the run trains in: between two models whose products are rounded to bf16
there are tenths of a nat, where the models themselves have thousandths.
"""

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.config import DPOConfig
from minidpo.data import PairTokens, Tokenizer
from minidpo.distributed import all_gather, rank, ranks, reshard, shard
from minidpo.errors import UserError
from minidpo.files import replacing_file, writing
from minidpo.log import Progress
from minidpo.logprobs import at_least_float32, sum_by_response, tokens_per_chunk, widest_float
from minidpo.model import Sampling, Transformer, generate, hidden_states
from minidpo.model.lora import adapters_off, add_adapters
from minidpo.packing import PackedBatch
from minidpo.sections import LoRASection
from minidpo.training.reference import reference_or_policy
from minidpo.training.reward_scorer import RewardScorer, mean_and_error, text_after
from minidpo.training.run import Run
from minidpo.training.scoring import MICRO_TOKENS, values_of_every_prompt


@dataclass(frozen=True)
class Samples:
    """One sampled response per prompt, and its reward (None without a reward model)."""

    ids: list[list[int]]
    texts: list[str]
    ended: np.ndarray  # bool: whether it ends with EOS, and was not cut off
    rewards: np.ndarray | None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens, EOS included."""
        return np.array([len(ids) for ids in self.ids])


class SampledEvaluation:
    """Samples from policy and reference to the same held-out prompts, at temperature 1: each evaluation's
    figures.

    Both draw independently of one another, the policy anew at each evaluation. win_rate is the share of
    prompts to which the policy's response has the higher reward: of a policy that equals its reference, (1 -
    tie_rate) / 2 on average. Raises UserError where a prompt leaves no room for max_new_tokens in the policy
    or the reward model.
    """

    def __init__(
        self, config: DPOConfig, run: Run, held_out: PairTokens, tokenizer: Tokenizer, policy: Transformer
    ) -> None:
        self._run, self._tokenizer, self._config = run, tokenizer, config
        self._sampling = Sampling(config.eval.max_new_tokens)
        self._scorer = (
            RewardScorer(config.eval.reward_model, run.device) if config.eval.reward_model else None
        )
        template = tokenizer.chat_template(config.data.template, config.data.date)
        templated = np.zeros(len(held_out), bool) if held_out.templated is None else held_out.templated
        if self._scorer:
            self._scorer.compare(tokenizer, template if templated.any() else None)
        # The first rows with a prompt that no row before them has.
        first = dict(zip(reversed(held_out.token_keys()), reversed(range(len(held_out))), strict=True))
        rows = sorted(first.values())[: config.eval.samples]
        self._prompts = [held_out.ids[start:end].tolist() for start, end in held_out.bounds[rows, :2]]
        tails = [template.tail if written else None for written in templated[rows]]
        as_text = map(tokenizer.prompt, self._prompts)
        self._as_text = [text._replace(tail=tail) for text, tail in zip(as_text, tails, strict=True)]
        self._require_room(policy.config.max_length)
        self._of_reference: Samples | None = None

    def __call__(self, policy: Transformer, step: int) -> dict[str, float]:
        """Figures of this step, under names without "eval/"; the samples go to OUT/samples/step-N.jsonl."""
        # The reference is read anew each time, so that between evaluations the policy has its memory. With
        # adapters it is the policy, with its adapters off.
        device, seed = self._run.device, self._run.seed
        policy = _in_float32(policy, device, self._run.dtype, self._config.lora)
        reference = reference_or_policy(self._config, policy, device, "fp32")
        if self._of_reference is None:
            # With the policy's seed, both would say the same as long as they are much alike, and mostly tie.
            with adapters_off(reference):
                self._of_reference = self._sample(reference, "sampling, reference", seed + ranks())
        base = self._of_reference
        samples = self._sample(policy, "sampling", seed)
        divergence = divergences(policy, reference, self._prompts, samples.ids, device, "fp32")
        del policy, reference
        gc.collect()  # Sharded layers refer to one another; without this they would stay beside the policy.
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
        return {name: value for name, value in figures.items() if not math.isnan(value)}  # one has no error

    def _sample(self, model: Transformer, label: str, seed: int) -> Samples:
        """Each rank samples for as many prompts as the others, because all gather sharded layers together."""
        seed, stops = seed + rank(), self._tokenizer.stop_ids
        each = -(-len(self._prompts) // ranks())
        own = [self._prompts[i % len(self._prompts)] for i in range(rank() * each, (rank() + 1) * each)]
        progress = Progress(label, len(own), "responses")
        drawn = generate(model, own, self._sampling, stops, seed, progress=progress.advance)
        progress.close(last_line=False)
        ids = [row for part in all_gather(drawn) for row in part][: len(self._prompts)]
        texts = [text_after(self._tokenizer, *both) for both in zip(self._prompts, ids, strict=True)]
        rewards = self._scorer.rewards(self._as_text, texts) if self._scorer else None
        ended = np.array([row[-1] in stops for row in ids])
        return Samples(ids, texts, ended, rewards)

    def _write(self, step: int, samples: Samples, divergence: np.ndarray) -> None:
        if rank():
            return
        file = self._run.out / "samples" / f"step-{step}.jsonl"
        rows = []
        for i, text in enumerate(samples.texts):
            row = {"prompt": self._as_text[i].text, "response": text, "tokens": len(samples.ids[i])}
            row |= {"ended": bool(samples.ended[i]), "log_ratio": float(divergence[i, 0])}
            row["kl"] = float(divergence[i, 1])
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
        if not self._scorer:
            return
        # Another tokenizer may cut the same text into more tokens.
        same = not self._scorer.tokenizer.conflict(self._tokenizer)
        room = min(map(self._scorer.room, self._as_text), default=limit)
        if (new + 1) * (1 if same else 2) > room:
            raise UserError(
                f"eval.max_new_tokens = {new}, but eval.reward_model takes {self._scorer.max_length} tokens,"
                f" and its longest prompt leaves {room}"
            )


def _in_float32(policy: Transformer, device: torch.device, dtype: str, lora: LoRASection) -> Transformer:
    """The same weights in a model whose layers are gathered in float32, where `shard` has them in bf16."""
    if ranks() == 1 or dtype == "fp32":
        return policy
    reshard(policy)
    with torch.device("meta"):
        view = Transformer(policy.config)
    add_adapters(view, lora)
    shard(view, device, "fp32")
    view.load_state_dict(policy.state_dict(), assign=True)
    return view


def divergences(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[list[int]],
    samples: Sequence[list[int]],
    device: torch.device,
    dtype: str,
) -> np.ndarray:
    """Both estimates for the policy's own `samples`: (samples, 2) nats, of log-ratios and of next tokens."""
    pairs = PairTokens.from_responses(prompts, [[response] for response in samples])
    compute = partial(divergence, policy, reference)
    return values_of_every_prompt(compute, pairs, MICRO_TOKENS, device, dtype)


@torch.no_grad()
def divergence(policy: Transformer, reference: Transformer, batch: PackedBatch) -> Tensor:
    """Both estimates for the one response of each prompt of a packed row: (P, 2)."""
    # The hidden states before every scored token, (S, D) each
    ours = hidden_states(policy, batch)[batch.predictor]
    with adapters_off(reference):  # It may be the policy itself.
        theirs = hidden_states(reference, batch)[batch.predictor]
    ratios, kls = [], []
    chunk = tokens_per_chunk(policy.config.vocab_size, torch.float32)
    for h, h_reference, target in zip(
        ours.split(chunk), theirs.split(chunk), batch.targets.split(chunk), strict=True
    ):
        logps, reference_logps = (
            at_least_float32(F.linear(h, model.output_weight.to(h.dtype))).log_softmax(-1)  # (chunk, V)
            for h, model in ((h, policy), (h_reference, reference))
        )
        logratios = logps - reference_logps
        ratios.append(logratios.gather(-1, target[:, None]).squeeze(-1))
        kls.append((logps.exp() * logratios).sum(-1))
    each = (torch.cat(values).to(widest_float(policy.model.norm.weight.device)) for values in (ratios, kls))
    return torch.stack([sum_by_response(values, batch.lengths[:, 0]) for values in each], dim=1)


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of all responses over their tokens, as in Li et al. 2016: low if a policy repeats
    itself."""
    grams = {tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)}
    return len(grams) / max(1, sum(map(len, responses)))
