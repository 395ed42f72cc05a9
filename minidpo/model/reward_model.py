"""The reward model: the transformer and one Linear(hidden, 1, bias=False) on the last token of each
response."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpo.model.packed import hidden_states, response_logps
from minidpo.model.transformer import ModelConfig, Transformer
from minidpo.packing import PackedBatch


class RewardModel(Transformer):
    """r(x, y) = score . h(last token of y), h being the final, normalised hidden state.

    There is no bias: Bradley-Terry sees only differences, so a bias would get no gradient from it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        if (
            not self.score.weight.is_meta
        ):  # On the meta device there is nothing to initialise: weights are loaded.
            self.score.weight = nn.Parameter(fresh_score(config.hidden_size))

    @classmethod
    def from_language_model(cls, language_model: Transformer) -> "RewardModel":
        """The language model's own weights (not a copy) under a fresh head."""
        config = language_model.config
        with torch.device("meta"):
            model = cls(config)
        model.model, model.lm_head = language_model.model, language_model.lm_head
        model.score.weight = nn.Parameter(fresh_score(config.hidden_size).to(language_model.output_weight))
        return model

    def forward_packed(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Rewards (P, K) of all responses of a packed row, and log pi(y|x) (P, scored) of the scored ones, if
        any.

        Rewards and log-probs come from one pass.
        """
        hidden = hidden_states(self, batch)  # (N, D)
        rewards = self.rewards_of(hidden[batch.last])
        return rewards, response_logps(self, batch, hidden) if batch.scored else None

    def rewards_of(self, last: Tensor) -> Tensor:
        """Hidden states of last tokens (..., D) to rewards (...)."""
        # This product is computed in float32 even under autocast, because bf16 rewards step by 1/128 near 1.
        weight = self.score.weight.to(torch.promote_types(self.score.weight.dtype, torch.float32))
        with torch.autocast(last.device.type, enabled=False):
            return F.linear(last.to(weight.dtype), weight).squeeze(-1)


def fresh_score(hidden_size: int) -> Tensor:
    """A new head (1, D): N(0, 1 / (hidden + 1)), as in Stiennon et al. 2020: its rewards are of order 1."""
    return torch.randn(1, hidden_size) * (hidden_size + 1) ** -0.5
