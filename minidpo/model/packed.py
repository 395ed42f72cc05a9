"""What one forward pass over a packed row gives: hidden states, and log-probs of the responses."""

from torch import Tensor

from minidpo.logprobs import sum_by_response, token_logps
from minidpo.model.attention import packed_attention
from minidpo.model.transformer import Transformer
from minidpo.packing import PackedBatch


def hidden_states(model: Transformer, batch: PackedBatch) -> Tensor:
    """The final hidden state of every token of the row: (N, D)."""
    return model.hidden_states(batch.tokens, batch.position, packed_attention(batch))


def response_token_logps(model: Transformer, batch: PackedBatch, hidden: Tensor | None = None) -> Tensor:
    """log pi(y_t | x, y_<t) of every scored token y_t: (S,), nats.

    hidden: the row's `hidden_states`, where the caller has computed them already.
    """
    hidden = hidden_states(model, batch) if hidden is None else hidden
    # Only the hidden states that predict a response token go through the output matrix: (S, D), not (N, D).
    return token_logps(hidden[batch.predictor], model.output_weight, batch.targets)


def response_logps(model: Transformer, batch: PackedBatch, hidden: Tensor | None = None) -> Tensor:
    """log pi(y|x) of every scored response: (P, scored), nats; what `logprobs.sequence_logps` computes of
    padded rows."""
    # log pi(y|x) = sum over t of log pi(y_t | x, y_<t). Scored tokens lie response after response: (S,).
    logps = response_token_logps(model, batch, hidden)
    # The responses lie in the order of prompts: those of prompt 0, of prompt 1, ... So their sums reshape to
    # (P, scored).
    lengths = batch.lengths[:, : batch.scored_responses]
    return sum_by_response(logps, lengths.flatten()).view(lengths.shape)
