"""What one pass of a model over a packed row gives: hidden states, and log-probs of the responses."""

from torch import Tensor

from minidpo.logprobs import sum_by_response, token_logps
from minidpo.model.attention import packed_attention
from minidpo.model.transformer import Transformer
from minidpo.packing import PackedBatch


def hidden_states(model: Transformer, batch: PackedBatch) -> Tensor:
    """The final hidden state of every token of the row: (N, D)."""
    return model.hidden_states(batch.tokens, batch.position, packed_attention(batch))


def response_token_logps(model: Transformer, batch: PackedBatch, hidden: Tensor | None = None) -> Tensor:
    """log pi of every scored token given its prompt and what comes before it: (S,), nats.

    hidden: the `hidden_states` of the same row, where they are there already.
    """
    hidden = hidden_states(model, batch) if hidden is None else hidden
    return token_logps(hidden[batch.predicts], model.output_weight, batch.targets)


def response_logps(model: Transformer, batch: PackedBatch, hidden: Tensor | None = None) -> Tensor:
    """log pi(y|x) of every scored response: (P, scored), nats; the packed twin of `sequence_logps`."""
    logps = response_token_logps(model, batch, hidden)
    return sum_by_response(logps, batch.scored_lengths.flatten()).view(batch.scored_lengths.shape)
