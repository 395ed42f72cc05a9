"""What the policy writes by itself: sampled responses to held-out prompts, beside those of the reference.

A loss and an accuracy say how the policy ranks other people's responses, not what it writes. Of responses y
sampled from pi, KL(pi || pi_ref) is estimated by the chain rule of KL, in nats per response, without bias:

    sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t))

It sums over every token that could come next and leaves only the prefix to chance. So it is never negative,
and has far less noise than the log-ratio of y, which is another estimate. All is computed in float32: between
two models whose products are rounded to bf16 there are tenths of a nat, where these have thousandths.
"""

import gc
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidpo.config import DPOConfig
from minidpo.data import PairTokens, Tokenizer
from minidpo.distributed import all_gather, rank, ranks, reshard, shard
from minidpo.errors import UserError
from minidpo.files import write_file, writing
from minidpo.log import Progress
from minidpo.logprobs import at_least_float32, sum_by_response, tokens_per_chunk, widest_float
from minidpo.model import Sampling, Transformer, generate, hidden_states
from minidpo.model.lora import adapters_off, add_adapters
from minidpo.packing import PackedBatch
from minidpo.sections import LoRASection
from minidpo.training.reference import load_reference
from minidpo.training.reward_scorer import RewardScorer, mean_and_error, text_after
from minidpo.training.run import Run
from minidpo.training.scoring import MICRO_TOKENS, values_of_every_prompt


class Samples(NamedTuple):
    """One sampled response per prompt."""

    ids: list[list[int]]
    texts: list[str]
    lengths: np.ndarray  # tokens, EOS included
    ended: np.ndarray  # bool: whether it ends with EOS, and was not cut off
    rewards: np.ndarray | None  # None without a reward model


class SampledEvaluation:
    """The figures of each evaluation, from samples of policy and reference at temperature 1.

    Both draw independently of one another, the policy anew at each evaluation. win_rate is the share of
    prompts to which the policy's response has the higher reward: of a policy that equals its reference, (1 -
    tie_rate) / 2 on average. Raises UserError where a prompt leaves no room for max_new_tokens.
    """

    def __init__(
        self, config: DPOConfig, run: Run, held_out: PairTokens, tokenizer: Tokenizer, policy: Transformer
    ) -> None:
        self._config, self._run, self._tokenizer = config, run, tokenizer
        self._sampling = Sampling(config.eval.max_new_tokens)
        reward_model = config.eval.reward_model
        self._scorer = RewardScorer(reward_model, run.device) if reward_model else None
        template = tokenizer.chat_template(config.data.template, config.data.date)
        templated = np.zeros(len(held_out), bool) if held_out.templated is None else held_out.templated
        if self._scorer:
            self._scorer.compare(tokenizer, template if templated.any() else None)
        # The first rows with a prompt that no row before them has.
        first = dict(zip(reversed(held_out.token_keys()), reversed(range(len(held_out))), strict=True))
        rows = sorted(first.values())[: config.eval.samples]
        self._prompts = [held_out.ids[start:end].tolist() for start, end in held_out.bounds[rows, :2]]
        both = zip(map(tokenizer.prompt, self._prompts), templated[rows], strict=True)
        self._as_text = [text._replace(tail=template.tail if written else None) for text, written in both]
        new, limit = config.eval.max_new_tokens, policy.config.max_length
        longest = max(map(len, self._prompts), default=0)
        if longest + new > limit:
            raise UserError(
                f"eval.max_new_tokens = {new} after a prompt of {longest} tokens; the model takes {limit}"
            )
        if self._scorer and (room := min(map(self._scorer.room, self._as_text), default=limit)) <= new:
            raise UserError(
                f"eval.max_new_tokens = {new}, but eval.reward_model takes {self._scorer.max_length} tokens,"
                f" and its longest prompt leaves {room}"
            )
        self._of_reference: Samples | None = None

    def __call__(self, policy: Transformer, step: int) -> dict[str, float]:
        """Figures of this step, under names without "eval/"; the samples go to OUT/samples/step-N.jsonl."""
        # The reference is read anew each time, so that between evaluations the policy has its memory.
        device, seed = self._run.device, self._run.seed
        policy = _in_float32(policy, device, self._run.dtype, self._config.lora)
        reference = load_reference(self._config, policy, device, "fp32")
        if self._of_reference is None:
            # With the policy's seed, both would say the same as long as they are much alike, and mostly tie.
            with adapters_off(reference):
                self._of_reference = self._sample(reference, "sampling, reference", seed + ranks())
        base = self._of_reference
        samples = self._sample(policy, "sampling", seed)
        kls = divergences(policy, reference, self._prompts, samples.ids, device)
        del policy, reference
        gc.collect()  # Sharded layers refer to one another; without this they would stay beside the policy.
        kl, kl_error = mean_and_error(kls)
        figures = {
            "kl": kl,
            "kl_standard_error": kl_error,
            "kl_of_worst": float(kls.max()),
            "kl_per_token": float(kls.sum() / samples.lengths.sum()),
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
        if rank() == 0:
            self._write(step, samples, kls)
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
        return Samples(ids, texts, np.array([len(row) for row in ids]), ended, rewards)

    def _write(self, step: int, samples: Samples, kls: np.ndarray) -> None:
        columns = {"prompt": [prompt.text for prompt in self._as_text], "response": samples.texts}
        columns |= {"tokens": samples.lengths.tolist(), "ended": samples.ended.tolist(), "kl": kls.tolist()}
        if samples.rewards is not None:
            columns["reward"] = samples.rewards.tolist()
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        file = self._run.out / "samples" / f"step-{step}.jsonl"
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams of all responses over their tokens (Li et al. 2016): low where texts repeat."""
    grams = {tuple(ids[i : i + n]) for ids in responses for i in range(len(ids) - n + 1)}
    return len(grams) / max(1, sum(map(len, responses)))


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
) -> np.ndarray:
    """The KL of each of the policy's own `samples`, one per prompt: (samples,) nats."""
    chunk = tokens_per_chunk(policy.config.vocab_size, torch.float32)

    def of_row(policy: Transformer, batch: PackedBatch) -> Tensor:  # (P, 1)
        # The hidden states before every scored token, (S, D) each
        ours = hidden_states(policy, batch)[batch.predictor]
        with adapters_off(reference):  # It may be the policy itself.
            theirs = hidden_states(reference, batch)[batch.predictor]
        kls = []
        for both in zip(ours.split(chunk), theirs.split(chunk), strict=True):
            logps, reference_logps = (
                at_least_float32(F.linear(h, model.output_weight.to(h.dtype))).log_softmax(-1)  # (chunk, V)
                for h, model in zip(both, (policy, reference), strict=True)
            )
            kls.append((logps.exp() * (logps - reference_logps)).sum(-1))
        of_tokens = torch.cat(kls).to(widest_float(device))
        return sum_by_response(of_tokens, batch.lengths[:, 0])[:, None]

    pairs = PairTokens.from_responses(prompts, [[response] for response in samples])
    return values_of_every_prompt(of_row, policy, pairs, MICRO_TOKENS, device, "fp32")[:, 0]
