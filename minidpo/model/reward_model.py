"""The reward model: the transformer, and Linear(hidden, 1, bias=False) on each response's last token.

Dimensions: N tokens of a packed row, P prompts with K responses each, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpo.model.packed import hidden_states, response_logps
from minidpo.model.transformer import ModelConfig, Transformer
from minidpo.packing import PackedBatch


class RewardModel(Transformer):
    """r(x, y) = score . h(last token of y), h being the final, normalised hidden state.

    The head has no bias: Bradley-Terry depends only on differences of rewards, which a bias does not change.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        # A model on the meta device has no memory yet: its weights are loaded later.
        if not self.score.weight.is_meta:
            self.score.weight = nn.Parameter(fresh_score(config.hidden_size))

    def forward_packed(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Rewards (P, K) of a packed row's responses; log pi(y|x) of the scored ones, if any, (P, scored)."""
        # One forward pass gives both. A response's last token, EOS, has seen all of the prompt and response.
        hidden = hidden_states(self, batch)  # (N, D)
        # float32 even under autocast: between 1 and 2, neighbouring bf16 numbers differ by 1/128, which would
        # make many pairs of rewards equal.
        weight = self.score.weight.to(torch.promote_types(self.score.weight.dtype, torch.float32))
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = F.linear(hidden[batch.last].to(weight.dtype), weight).squeeze(-1)  # (P, K)
        # Granite's hidden states come divided, for its logits.
        rewards = rewards * self.config.logits_scaling
        return rewards, response_logps(self, batch, hidden) if batch.scored_responses else None


def fresh_score(hidden_size: int) -> Tensor:
    """A new head (1, D), drawn from N(0, 1 / (D + 1)) as in Stiennon et al. 2020."""
    # Hidden states are normalised, so that rewards begin with a variance of about 1, whatever D is. Those of
    # two responses have much in common, so their rewards differ by less than that would suggest.
    return torch.randn(1, hidden_size) * (hidden_size + 1) ** -0.5
