"""What a model is made of: sizes, the variants in which families differ, special tokens."""

from dataclasses import dataclass

from minidpo.model.rotary import LongRope, RopeScaling


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
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    # Where the families differ
    qkv_bias: bool = False  # Qwen2; Llama and Qwen3 with attention_bias
    output_bias: bool = False  # the attention's o_proj; Llama and Qwen3 with attention_bias
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm over each head of q and k
    qk_norm_whole: bool = False  # OLMo 2: RMSNorm over all heads of q together, and over all of k
    norm_after: bool = False  # OLMo 2: norms after attention and MLP, not before
    no_rope_layers: tuple[int, ...] | None = None  # SmolLM3: per layer 0 if q and k are not rotated, else 1
    fused_projections: bool = False  # Phi-3: q, k and v are one layer, and so are the MLP's gate and up
    partial_rotary_factor: float = 1.0  # Phi-4-mini: the share of each head that is rotated
    embedding_multiplier: float = 1.0  # Granite's four: of the token embeddings,
    attention_multiplier: float | None = None  # of q k^T, instead of 1 / sqrt(E),
    residual_multiplier: float = 1.0  # of what attention and MLP add to the residual stream,
    logits_scaling: float = 1.0  # and the divisor of the logits
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def max_length(self) -> int:
        """The longest sequence these weights were made for, in tokens."""
        rope = self.rope_scaling
        original = rope.original_max_position_embeddings if isinstance(rope, LongRope) else None
        return min(filter(None, (self.max_position_embeddings, self.sliding_window, original)))
