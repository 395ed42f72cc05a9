"""The reward model: the transformer and one Linear(hidden, 1, bias=False) on the last token of each ending."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpo.logprobs import sum_by_ending, token_logps
from minidpo.model import ModelConfig, Transformer
from minidpo.packing import PackedRow


class RewardModel(Transformer):
    """r(x, y) = score . h(last token of y), h being the final, normalised hidden state.

    No bias: Bradley-Terry sees only differences, so a bias would get no gradient from it.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        if not self.score.weight.is_meta:  # to be loaded
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

    def pair_rewards(self, row: PackedRow) -> tuple[Tensor, Tensor | None]:
        """Rewards (B, 2) of chosen and rejected, and the chosen endings' summed log-probs (B,) if laid out.

        The row must want rewards (`Wanted(rewards=True)`); both endings of a pair come from one forward pass.
        """
        hidden = self.hidden_states(
            row.tokens, row.places.position, row.attends(self.config.num_hidden_layers), row.queries
        )
        rewards = self.rewards_of(hidden[row.last])  # (B, 2)
        if not row.endings:
            return rewards, None
        logps = token_logps(hidden[row.scored], self.output_weight, row.targets)
        return rewards, sum_by_ending(logps, row.scored_lengths)

    def rewards_of(self, last: Tensor) -> Tensor:
        """Hidden states of last tokens (..., D) to rewards (...)."""
        # One product of width 1: float32, for bf16 rewards step by 1/128 near 1.
        weight = self.score.weight.to(torch.promote_types(self.score.weight.dtype, torch.float32))
        with torch.autocast(last.device.type, enabled=False):
            return F.linear(last.to(weight.dtype), weight).squeeze(-1)


def fresh_score(hidden_size: int) -> Tensor:
    """A new head (1, D): N(0, 1 / (hidden + 1)), as Stiennon et al. 2020: its rewards are of order 1."""
    return torch.randn(1, hidden_size) * (hidden_size + 1) ** -0.5
