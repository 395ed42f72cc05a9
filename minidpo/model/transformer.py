"""A decoder-only transformer of the Llama family, written out. Parameters have Hugging Face's names.

Dimensions: R rows, T tokens per row (or one packed row of N tokens and no R), D hidden size, H query heads,
G key/value heads, E head size, V vocabulary, I MLP width; ... stands for R, or for nothing.
Llama, Mistral, Qwen2, Qwen3, SmolLM, OLMo 2, Granite 3 and Phi-3 are this one decoder with different
`ModelConfig` fields.
There is no dropout anywhere, because policy and reference must agree exactly at step 0.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidpo.model.model_config import ModelConfig
from minidpo.model.rotary import rotary_frequencies, rotate

# attend(q (..., T, H, E), k (..., T, G, E), v (..., T, G, E), layer_index) -> (..., T, H, E): attention in
# one layer. The caller chooses which token may attend to which: causal rows, packed rows, or a key/value
# cache.
Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


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
        output = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        if output is None:
            raise ValueError("these weights have no lm_head: a saved reward model gives rewards, not logits")
        return output.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (R, T, V) of padded rows (R, T), as in textbook.py. Training uses `hidden_states`."""
        if tokens.shape[-1] > self.config.max_length:
            raise ValueError(f"{tokens.shape[-1]} tokens; this model takes {self.config.max_length}")
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        # Rows padded on the right need no mask: padding comes last, and no token attends to a later one.
        hidden = self.hidden_states(tokens, positions, lambda q, k, v, layer: causal_attention(q, k, v))
        return F.linear(hidden, self.output_weight.to(hidden.dtype))

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states, normalised: (..., T, D), or (N, D) of one packed row (N,).

        positions, (T,) or shaped like tokens: the place of each token in its own text, wherever it lies.
        """
        x = self.model.embed_tokens(tokens)  # (..., T, D)
        # Sharded or frozen weights may be bf16, but the residual stream is float32 or better (see Layer.add).
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        # The angles depend on positions only, so all layers share them.
        rotation = self.model.rotation(positions)
        for i, layer in enumerate(self.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Keep only the layer's input for the backward pass, which computes the rest again.
                x = checkpoint(layer, x, rotation, attend, i, use_reentrant=False)
            else:
                x = layer(x, rotation, attend, i)
        x = self.model.norm(x)
        # Granite divides its logits. Dividing what they are computed from reaches all who compute logits.
        return x if self.config.logits_scaling == 1 else x / self.config.logits_scaling

    def compile_layers(self) -> None:
        """torch.compile each layer except for its attention, which packed_attention chooses."""
        for layer in self.model.layers:
            for part in ("before_attention", "after_attention"):
                setattr(layer, part, _compiled_for_packed_rows(getattr(layer, part)))


def _compiled_for_packed_rows(part: Callable) -> Callable:
    compiled = torch.compile(part, dynamic=True)
    # Sampling has several rows, of other shapes in each batch: compiling would take longer than all of it.
    return lambda x, *others: (compiled if x.ndim == 2 else part)(x, *others)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles (see rotary.py) of all positions, (..., T, 1, E/2) each, float32
        or better; with a partial_rotary_factor they are fewer than E/2."""
        # bf16 has 8 bits of precision, so that positions 1000 and 1001 would have the same angle.
        dtype = torch.float64 if self.norm.weight.dtype == torch.float64 else torch.float32
        size = int(self.config.head_dim * self.config.partial_rotary_factor)  # coordinates that are rotated
        theta, scaling = self.config.rope_theta, self.config.rope_scaling
        frequencies = rotary_frequencies(size, theta, scaling, positions.device, dtype)
        angles = positions.to(dtype)[..., None, None] * frequencies
        magnitude = 1.0 if scaling is None else scaling.magnitude
        return angles.cos() * magnitude, angles.sin() * magnitude


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.norm_after, self.residual_multiplier = config.norm_after, config.residual_multiplier
        self.self_attn = Attention(config, index)
        self.mlp = MLP(config)
        # Hugging Face's post_attention_layernorm is the MLP's norm, which comes before it, except in OLMo 2,
        # where it is the attention's norm, which comes after it.
        if not config.norm_after:
            self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.norm_after:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend, layer_index: int) -> Tensor:
        q, k, v = self.before_attention(x, rotation)
        return self.after_attention(x, attend(q, k, v, layer_index))

    def before_attention(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        # Norms come before attention and MLP (in OLMo 2 after), so that the residual stream is a plain sum.
        return self.self_attn.project(x if self.norm_after else self.input_layernorm(x), rotation)

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        attended = self.self_attn.o_proj(attended.flatten(-2))
        if self.norm_after:
            x = self.add(x, self.post_attention_layernorm(attended))
            return self.add(x, self.post_feedforward_layernorm(self.mlp(x)))
        x = self.add(x, attended)
        return self.add(x, self.mlp(self.post_attention_layernorm(x)))

    def add(self, x: Tensor, update: Tensor) -> Tensor:
        # The residual stream (Elhage et al. 2021: the x to which every layer adds) is float32 even under
        # autocast, because bf16 would round what a layer adds.
        return torch.add(x, update, alpha=self.residual_multiplier)  # x + alpha * update


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        width, head_dim, bias = config.hidden_size, config.head_dim, config.qkv_bias
        q_width, k_width = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.head_dim, self.qk_norm_whole = head_dim, config.qk_norm_whole
        self.widths = [q_width, k_width, k_width]
        # Hugging Face's name misleads: 1 means that the layer is rotated, 0 that it is not.
        self.rotated = config.no_rope_layers is None or bool(config.no_rope_layers[index])
        # All forms of attention divide q k^T by sqrt(E); where it is to be another scale, q makes up for it.
        scale = config.attention_multiplier
        self.q_multiplier = None if scale is None else scale * head_dim**0.5
        self.fused = config.fused_projections
        if self.fused:
            self.qkv_proj = nn.Linear(width, sum(self.widths), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, n, bias=bias) for n in self.widths)
        self.o_proj = nn.Linear(q_width, width, bias=config.output_bias)
        # The norm of queries and keys: none, one of each head, or one of all heads together.
        q_size, k_size = (q_width, k_width) if config.qk_norm_whole else (head_dim, head_dim)
        normed = config.qk_norm or config.qk_norm_whole
        self.q_norm = RMSNorm(q_size, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(k_size, config.rms_norm_eps) if normed else nn.Identity()

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., T, H, E), k and v (..., T, G, E); q and k are rotated by their positions."""
        # One matrix product for all heads, whose result is then split into heads: (..., T, H * E).
        if self.fused:
            q, k, v = self.qkv_proj(x).split(self.widths, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in (q, k, v))
        if not self.qk_norm_whole:
            q, k = self.q_norm(q), self.k_norm(k)
        # After rotation, the product of a query and a key depends on the distance of their positions.
        if self.rotated:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return q if self.q_multiplier is None else q * self.q_multiplier, k, v


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


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fused = config.fused_projections
        if self.fused:
            self.gate_up_proj = nn.Linear(width, 2 * inner, bias=bias)
        else:
            self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # SwiGLU (Shazeer 2020): the gate decides how much of each of the I inner values passes.
        gate, up = (
            self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        )
        return self.down_proj(F.silu(gate) * up)


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
