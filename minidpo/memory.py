"""How much memory a run needs a GPU, counted from the model's shape: which model fits where.

Dimensions as in model.py: D hidden size, H and K query and key/value heads of size E, I MLP width, V vocabulary.
Source of the scheme: Rajbhandari et al. 2020 (ZeRO) for what is sharded, Korthikanti et al. 2022 for activations.
"""

from dataclasses import dataclass, replace

import torch

from minidpo.logprobs import chunk_rows
from minidpo.model import ModelConfig, Transformer

STATE_BYTES = 16  # a parameter: weight, gradient and AdamW's two moments, float32 each


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step, in backward."""

    states: int  # weights, gradients, moments: this rank's share
    gathered: int  # bf16 copies of weights that a pass works with, and their gradients
    activations: int  # what forward keeps for backward
    work: int  # logits of one chunk and the output matrix's gradient, or one layer's backward, which comes later

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.work


def step_memory(
    config: ModelConfig,
    micro_tokens: int,
    ranks: int = 1,
    activation_checkpointing: bool = False,
    scored: float = 0.6,
    device: str = "cuda",
) -> Memory:
    """Memory of one rank of `ranks` in a bf16 step of `micro_tokens` tokens, reference precomputed.

    scored: share of the tokens that are scored, 0.6 in HH-RLHF. device: the two paths keep different things. Left
    out: the CUDA context (about 0.5 GB), what the allocator holds unused, NCCL's buffers.
    """
    layer, outside = parameter_counts(config)
    parameters = layer * config.num_hidden_layers + outside
    # One rank: autocast keeps its copies until the pass ends. Several: two layers (the next one comes while one
    # computes), one layer's gradient in bf16 and float32; what is outside the layers, and its gradient, throughout.
    gathered = 2 * parameters if ranks == 1 else 2 * 2 * layer + (2 + 4) * layer + (2 + 2) * outside
    chunk = min(chunk_rows(config.vocab_size, torch.bfloat16), round(micro_tokens * scored))
    # Logits and their gradient in bf16, logits in float32; the output matrix's gradient in float32.
    output = (2 + 4 + 2) * chunk * config.vocab_size + 4 * config.vocab_size * config.hidden_size
    kept = _layer_bytes(config, scored, device)
    backward: float = 6 * config.intermediate_size  # gradients of the MLP's three products, in bf16
    if activation_checkpointing:  # each layer's input, and one layer as it is computed again
        activations: float = 4 * config.hidden_size * config.num_hidden_layers
        backward += kept
    else:  # the last layer computes for scored tokens alone
        activations = kept * (config.num_hidden_layers - 1 + scored)
    return Memory(
        STATE_BYTES * -(-parameters // ranks),
        gathered,
        round(activations * micro_tokens),
        max(output, round(backward * micro_tokens)),
    )


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Parameters of one layer, and of all that is outside the layers."""
    with torch.device("meta"):
        model = Transformer(replace(config, num_hidden_layers=1))
    one = sum(p.numel() for p in model.model.layers[0].parameters())
    return one, sum(p.numel() for p in model.parameters()) - one


def _layer_bytes(config: ModelConfig, scored: float, device: str) -> float:
    """What one layer keeps of each token for backward, in bytes."""
    d, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention: float
    if device == "cuda":
        norm = 4 * d  # its input, float32
        attention = 2 * (2 * queries + 2 * keys)  # q, the result, k and v, bf16
    else:  # float32
        norm = 8 * d  # the normed values too
        # A prompt's keys stand before both endings' as well as alone.
        attention = 4 * (2 * queries + 2 * keys * (1 + 2 * (1 - scored)))
    # In bf16: inputs of q k v, of o, of gate and up; gate, silu(gate), up and their product.
    return 2 * norm + 2 * (d + queries + d) + attention + 2 * 4 * inner
