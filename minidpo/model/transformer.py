"""A decoder-only transformer of the Llama family, written out. Parameters have Hugging Face's names.

Dimensions: R rows, T tokens per row (or one packed row of N tokens and no R), D hidden size, H query heads,
G key/value heads, E head size, V vocabulary, I MLP width; ... stands for R, or for nothing.
Llama, Mistral, Qwen2, Qwen3 and SmolLM are this one decoder with different `ModelConfig` fields.
There is no dropout anywhere, because policy and reference must agree exactly at step 0.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# attend(q (..., T, H, E), k (..., T, G, E), v (..., T, G, E), layer_index) -> (..., T, H, E): attention in
# one layer. The caller chooses which token may attend to which: causal rows, packed rows, or a key/value
# cache.
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretching of the slow rotary frequencies to a longer context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A model without its weights: sizes, variants, special tokens; names as in its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    sliding_window: int | None = None  # inputs may be no longer: only full attention is computed
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    # Where the families differ
    qkv_bias: bool = False  # Qwen2; Llama and Qwen3 with attention_bias
    output_bias: bool = False  # the attention's o_proj; Llama and Qwen3 with attention_bias
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm over each head of q and k
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def max_length(self) -> int:
        """The longest sequence these weights were made for, in tokens."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


class Transformer(nn.Module):
    """Token ids -> logits. `model` is everything below the output layer; `lm_head`, the output layer, is None
    if its weights are those of the token embedding (tied)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.activation_checkpointing = False
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        # A model on the meta device has no memory yet: its weights are loaded later.
        if isinstance(module, nn.Linear | nn.Embedding) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        # A token's logit is the product of the hidden state with that token's row of this matrix.
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight
        if self.lm_head is None:
            raise ValueError("these weights have no lm_head: a saved reward model gives rewards, not logits")
        return self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (R, T, V) of padded rows (R, T), as in textbook.py. Training uses `hidden_states`."""
        if tokens.shape[-1] > self.config.max_length:
            raise ValueError(f"{tokens.shape[-1]} tokens; this model takes {self.config.max_length}")
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        # Rows padded on the right need no mask: padding comes last, and no token attends to a later one.
        hidden = self.hidden_states(tokens, positions, lambda q, k, v, layer: causal_attention(q, k, v))
        return F.linear(hidden, self.output_weight)

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states, normalised: (..., T, D), or (N, D) of one packed row (N,).

        positions, (T,) or shaped like tokens: the place of each token in its own text, wherever it lies.
        """
        x = self.model.embed_tokens(tokens)  # (..., T, D)
        # Sharded weights may arrive in bf16, but the residual stream is float32 (see Layer.after_attention).
        if torch.is_autocast_enabled(x.device.type):
            x = x.float()
        # The angles depend on positions only, so all layers share them.
        rotation = self.model.rotation(positions)
        for i, layer in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Keep only the layer's input for the backward pass, which computes the rest again.
                x = checkpoint(layer, x, rotation, attend, i, use_reentrant=False)
            else:
                x = layer(x, rotation, attend, i)
        return self.model.norm(x)

    def compile_layers(self) -> None:
        """torch.compile each layer except for its attention, which is compiled on CUDA in any case."""
        for layer in self.model.layers:
            for part in ("before_attention", "after_attention"):
                setattr(layer, part, torch.compile(getattr(layer, part), dynamic=True))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles of all positions, (..., T, 1, E/2) each, float32 or better."""
        # bf16 has 8 bits of precision, so that positions 1000 and 1001 would have the same angle.
        dtype = torch.float64 if self.norm.weight.dtype == torch.float64 else torch.float32
        frequencies = rotary_frequencies(self.config, positions.device, dtype)
        angles = positions.to(dtype)[..., None, None] * frequencies
        return angles.cos(), angles.sin()


def rotary_frequencies(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """theta^(-2i/E) for i < E/2: radians per position, (E/2,). Su et al. 2021."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=dtype) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    # Llama 3.1: a frequency that makes few turns over the original context is divided by `factor`, so that
    # its angles stay in the range seen in training. One that makes many is kept; between, it is interpolated.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * torch.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)  # the share of the frequency that is kept
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, layer_index: int) -> Tensor:
        q, k, v = self.before_attention(x, rotation)
        return self.after_attention(x, attend(q, k, v, layer_index))

    def before_attention(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        # Norms come before attention and MLP, so that the residual stream itself is a plain sum.
        return self.self_attn.project(self.input_layernorm(x), rotation)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        # The residual stream is float32 even under autocast, because bf16 would round what a layer adds.
        x = x + self.self_attn.o_proj(attended.flatten(-2))
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, width, bias=config.output_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., T, H, E), k and v (..., T, G, E); q and k are rotated by their positions."""
        cos, sin = rotation
        # One matrix product for all heads, whose result is then split into heads: (..., T, H * E).
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        # After rotation, the product of a query and a key depends on the distance of their positions.
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v: q (..., Tq, H, E), k and v (..., Tk, G, E) -> (..., Tq, H, E).

    The causal mask is aligned at the bottom right: the last query attends to all keys, the one before to all
    but the last. A mask (..., 1, Tq, Tk) bool, true where a query may attend, replaces it.
    """
    q, k, v = (heads.transpose(-3, -2) for heads in (q, k, v))  # (..., H, T, E)
    queries, keys = q.shape[-2], k.shape[-2]
    # PyTorch's is_causal aligns at the top left, which is the same only for as many queries as keys.
    if mask is None and queries != keys and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    causal = mask is None and queries == keys
    k, v = k.to(q.dtype), v.to(q.dtype)
    # enable_gqa: each key/value head serves H / G query heads.
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return attended.transpose(-3, -2)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of coordinates (i, i + E/2), rotated by its angle."""
    # Hugging Face's weights are ordered for these halves; Su et al. rotate neighbours (2i, 2i + 1).
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # SwiGLU (Shazeer 2020): the gate decides how much of each of the I inner values passes.
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 or better."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        normed = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        # Cast once here; otherwise autocast would cast the same tensor again for each of q, k and v.
        device = x.device.type
        return normed.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
