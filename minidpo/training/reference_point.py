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
from minidpo.model import Transformer
from minidpo.training.reference import reference_logps
from minidpo.training.run import Run
from minidpo.training.scoring import all_logps


class ReferencePoint:
    """z0 of every batch of a run. Which responses are mismatched follows from the order of the run, so their
    log-probs under the reference are computed before training, and kept in OUT/mismatched.safetensors."""

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
        whole = np.random.default_rng(run.seed).permutation(len(held_out))
        self._held_out = held_out.mismatched([whole], self._max_length)
        mismatched = train.mismatched(steps, self._max_length)
        both = {"mismatched": mismatched, "mismatched, held out": self._held_out}
        sets = {name: (pairs, np.arange(len(pairs))) for name, pairs in both.items()}
        self._logps = reference_logps(config, run, sets, run.out / "mismatched.safetensors", policy)

    def of_step(self, policy: Transformer, step: int) -> Tensor:
        """z0 of the batch of step `step`, from 0: one number, nats."""
        texts = self._train.mismatched([self._order[step]], self._max_length)
        first = step * self._order.batch_size
        return self._of(policy, texts, self._logps["mismatched"][first : first + len(texts)])

    def of_held_out(self, policy: Transformer) -> Tensor:
        """z0 of all held-out records."""
        return self._of(policy, self._held_out, self._logps["mismatched, held out"])

    def _of(self, policy: Transformer, texts: PairTokens, reference: np.ndarray) -> Tensor:
        """texts: n mismatched responses; reference: their log-probs under it, (n, 1)."""
        run = self._run
        logps = all_logps(policy, texts, run.config.optim.micro_tokens, run.device, run.dtype)  # (n, 1)
        # A last batch of one record has no response to another prompt, but only its own.
        mean = np.mean(logps.astype(np.float64) - reference) if len(texts) > 1 else 0.0
        return torch.tensor(max(0.0, float(mean)), device=run.device)
