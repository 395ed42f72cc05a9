"""The optimizer step that `bench` times: train_dpo.py's and train_rm.py's, the textbook's, and ours stage by stage."""

import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minidpo.commands.bench_cases import Settings, with_reward_head
from minidpo.commands.bench_flops import synchronize
from minidpo.device import autocast, row_length
from minidpo.logprobs import response_logps, sequence_logps, sum_by_ending, token_logps
from minidpo.metrics import Averages
from minidpo.model import Transformer, causal_attention
from minidpo.optim import AdamW
from minidpo.packing import PackedRow, PairTokens, Wanted, micro_batches, pack_row
from minidpo.reference import BOTH_ENDINGS, of_every_pair
from minidpo.reward import RewardModel
from minidpo.sections import NEEDS_REFERENCE

# compute(model, pairs) -> (B, 2) log-probs or rewards (sft (B, 1)), and scored lengths of the same shape or none.
Compute = Callable[[Transformer, PairTokens], tuple[Tensor, Tensor]]


class Step:
    """One optimizer step over a batch of pairs: cut, compute, loss, backward, clip, AdamW."""

    def __init__(self, model: Transformer, pairs: PairTokens, settings: Settings, device: torch.device):
        if settings.loss == "rm":
            model = with_reward_head(model)
        self.model, self.pairs, self.settings, self.device = model, pairs, settings, device
        self.model.activation_checkpointing = settings.activation_checkpointing
        self.wanted = settings.wanted
        self.tokens = pairs.lengths[:, : 2 + self.wanted.rejected].sum(axis=1)
        self.micro_tokens = max(settings.micro_tokens, int(self.tokens.max()))
        if settings.compile:
            model.compile_layers()
        self.optimizer = AdamW(model, settings.optim)
        self.reference: Tensor | None = None
        if settings.loss in NEEDS_REFERENCE:  # of the policy before its first step
            logps = of_every_pair(
                lambda row: response_logps(model, row), BOTH_ENDINGS, pairs, self.micro_tokens, device,
                settings.dtype, "reference log-probs",
            )  # fmt: skip
            self.reference = torch.from_numpy(logps).to(device)

    def __call__(self, batch: np.ndarray) -> float:
        averages = self.accumulate(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return averages.mean("loss")

    def accumulate(self, batch: np.ndarray) -> Averages:
        averages = Averages()
        for rows in self.cut(batch):
            with autocast(self.device, self.settings.dtype):
                values, lengths = self.values(rows)
            losses, watched = self.settings.losses(values, self.reference_of(rows), lengths)
            (losses.sum() / len(batch)).backward()
            averages.add(watched)
        return averages

    def cut(self, batch: np.ndarray) -> list[np.ndarray]:
        return list(micro_batches(batch, self.tokens[batch], self.micro_tokens))

    def values(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Log-probs (or rewards) of the pairs at `rows`, (B, 2), and the scored lengths."""
        row = self.pack(rows)
        model = self.model
        values = model.pair_rewards(row)[0] if isinstance(model, RewardModel) else response_logps(model, row)
        return values, row.scored_lengths.view(len(rows), -1)

    def pack(self, rows: np.ndarray) -> PackedRow:
        length = row_length(self.device, self.micro_tokens)
        return pack_row(self.pairs.select(rows), self.wanted, length).to(self.device)

    def reference_of(self, rows: np.ndarray) -> Tensor | None:
        return None if self.reference is None else self.reference[torch.from_numpy(rows).to(self.device)]

    def in_stages(self, batch: np.ndarray) -> dict[str, float]:
        """The same step with a halt after each stage: seconds of each. The output layer's backward is its own."""
        clock = Clock(self.device)
        for rows in self.cut(batch):
            row = self.pack(rows)
            clock.stop("data and packing")
            with autocast(self.device, self.settings.dtype):
                attends = row.attends(self.model.config.num_hidden_layers)
                hidden = self.model.hidden_states(row.tokens, row.places.position, attends, row.queries)
                clock.stop("forward")
                cut_hidden = hidden.detach().requires_grad_()
                if isinstance(self.model, RewardModel):
                    values = self.model.rewards_of(cut_hidden[row.last])
                else:
                    logps = token_logps(cut_hidden[row.scored], self.model.output_weight, row.targets)
                    values = sum_by_ending(logps, row.scored_lengths).view(row.pairs, -1)
            lengths = row.scored_lengths.view(len(rows), -1)
            losses, _ = self.settings.losses(values, self.reference_of(rows), lengths)
            (losses.sum() / len(batch)).backward()
            clock.stop("output layer and loss")
            hidden.backward(cut_hidden.grad)
            clock.stop("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.stop("optimizer")
        return clock.seconds


class TextbookStep(Step):
    """Two padded rows a pair, all of a batch at once, all logits, a full log-softmax; else as `Step`.

    Its reference is computed once beforehand too, and its weights, optimizer, precision and threads are the same.
    """

    def cut(self, batch: np.ndarray) -> list[np.ndarray]:
        return [batch]

    def values(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens, scored = padded_rows(self.pairs.select(rows), self.wanted)
        tokens, scored = tokens.to(self.device), scored.to(self.device)
        if isinstance(self.model, RewardModel):
            positions = torch.arange(tokens.shape[1], device=self.device)
            attends = [causal_attention] * self.model.config.num_hidden_layers
            hidden = self.model.hidden_states(tokens, positions, attends)
            # Scored tokens are the text's last, so the last of them is where scored falls off.
            last = tokens.shape[1] - 1 - scored.flip(1).int().argmax(dim=1)
            values = self.model.rewards_of(hidden[torch.arange(len(tokens), device=self.device), last])
            counts = scored.sum(dim=1)
        else:
            values, counts = sequence_logps(self.model(tokens), tokens, scored)
        return values.view(-1, len(rows)).T, counts.view(-1, len(rows)).T


def padded_rows(pairs: PairTokens, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """tokens and scored (endings * B, T), padded on the right: all chosen texts, then all rejected."""
    texts = [(pairs.ids[start:end], pairs.ids[end:chosen]) for start, end, chosen, _ in pairs.bounds]
    if wanted.rejected:
        texts += [(pairs.ids[s:end], pairs.ids[chosen:rejected]) for s, end, chosen, rejected in pairs.bounds]
    width = max(len(prompt) + len(ending) for prompt, ending in texts)
    tokens = torch.zeros(len(texts), width, dtype=torch.int64)
    scored = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, (prompt, ending) in enumerate(texts):
        end = len(prompt) + len(ending)
        tokens[row, :end] = torch.from_numpy(np.concatenate((prompt, ending)).astype(np.int64))
        scored[row, len(prompt) : end] = True
    return tokens, scored


class Clock:
    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._last = device, time.perf_counter()

    def stop(self, stage: str) -> None:
        """Count the time since the last stop as `stage`'s."""
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


def seconds(step: Callable[[np.ndarray], object], batch: np.ndarray, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    step(batch)
    synchronize(device)
    return time.perf_counter() - started
