"""z0, the reference point of KTO: how much likelier than its reference the policy finds responses in general.

    z0 = max(0, mean over the batch of  log pi(y'|x) - log pi_ref(y'|x))      y': a response to another prompt

y' is the response of the record before, in the order of the batch; the first prompt gets that of the last.
The mean is over the whole batch of a step, whatever its micro-batches and processes, and is cut off at 0
after that: a mean of parts that are cut off would be too large. It is a constant of the step, so nothing is
kept for a backward pass. The held-out records are one batch, in an order drawn from the seed: files often
have the responses to one prompt one after the other.
"""

import numpy as np
import torch
from torch import Tensor

from minidpo.config import DPOConfig
from minidpo.data import PairOrder, PairTokens
from minidpo.distributed import all_reduce_sum
from minidpo.model import Transformer, response_logps
from minidpo.packing import pack
from minidpo.training.device import autocast
from minidpo.training.reference import reference_logps
from minidpo.training.run import Run


class ReferencePoint:
    """z0 of every batch of a run. Which responses are mismatched follows from the order of the run, so their
    log-probs under the reference are computed once, before training, and kept in
    OUT/mismatched.safetensors."""

    def __init__(
        self,
        config: DPOConfig,
        run: Run,
        train: PairTokens,
        order: PairOrder,
        held_out: PairTokens,
        policy: Transformer,
    ) -> None:
        self._run, self._max_length = run, config.data.max_length
        self._train, self._order = train, order
        # The texts of a step are made again when it is due, because all together are as large as the data.
        steps = [order[step] for step in range(len(order))]
        mismatched = train.mismatched(steps, self._max_length)
        whole = np.random.default_rng(run.seed).permutation(len(held_out))
        self._held_out = held_out.mismatched([whole], self._max_length)
        sets = {
            name: (pairs, np.arange(len(pairs)))
            for name, pairs in {"mismatched": mismatched, "mismatched, held out": self._held_out}.items()
        }
        self._logps = reference_logps(config, run, sets, "mismatched.safetensors", policy)

    def of_step(self, policy: Transformer, step: int) -> Tensor:
        """z0 of the batch of step `step`, from 0: one number, nats."""
        texts = self._train.mismatched([self._order[step]], self._max_length)
        first = step * self._order.batch_size
        return self._of(policy, texts, self._logps["mismatched"][first : first + len(texts)])

    def of_held_out(self, policy: Transformer) -> Tensor:
        """z0 of all held-out records."""
        return self._of(policy, self._held_out, self._logps["mismatched, held out"])

    @torch.no_grad()
    def _of(self, policy: Transformer, texts: PairTokens, reference: np.ndarray) -> Tensor:
        """texts: n mismatched responses; reference: their log-probs under it, (n, 1)."""
        device, total = self._run.device, torch.zeros((), dtype=torch.float64)
        for indices in self._run.micro_batches(texts.token_counts()):
            with autocast(device, self._run.dtype):
                logps = response_logps(policy, pack(texts, indices).to(device))  # (B, 1)
            total += (logps.double().cpu() - torch.from_numpy(reference[indices])).sum()
        return (all_reduce_sum(total.to(device)) / len(texts)).clamp(min=0)
