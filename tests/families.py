"""What is added to `tiny_config` to make it a model of each family that is read, and of each variant."""

from minidpo.model.rotary import DynamicRope, LinearRope, Llama3Rope, LongRope, YarnRope

# All three regimes of Llama 3's scaling and of YaRN occur among the frequencies of these heads.
LLAMA3 = Llama3Rope(8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = YarnRope(4.0, original_max_position_embeddings=64, beta_fast=8.0)
LONG = LongRope(4.0, 64, short_factor=(1.0, 1.5, 2.0, 2.5), long_factor=(1.0, 2.0, 4.0, 8.0))
OLMO2 = dict(model_type="olmo2", qk_norm_whole=True, norm_after=True)
SMOLLM3 = dict(model_type="smollm3", no_rope_layers=(1, 0, 0, 1), num_hidden_layers=4)
BIASES = dict(qkv_bias=True, output_bias=True, mlp_bias=True)
TIED = dict(tie_word_embeddings=True)
PHI3 = dict(model_type="phi3", fused_projections=True)
GRANITE = dict(
    model_type="granite",
    embedding_multiplier=3.0,
    attention_multiplier=0.2,
    residual_multiplier=0.4,
    logits_scaling=1.7,
)
FAMILIES = {
    "llama": {},
    "llama, a key head per query head": dict(num_key_value_heads=4),
    "llama biases": BIASES,
    "llama other numbers": dict(
        head_dim=12, rope_theta=500.0, rms_norm_eps=1e-3, eos_token_id=(2, 5), pad_token_id=0
    ),
    "llama 3": dict(rope_scaling=LLAMA3, rope_theta=1000.0, head_dim=16),
    "llama linear": dict(rope_scaling=LinearRope(4.0)),
    "llama dynamic": dict(rope_scaling=DynamicRope(4.0)),
    "mistral, window not reached": dict(model_type="mistral", sliding_window=64),
    "qwen2": dict(model_type="qwen2", qkv_bias=True),
    "qwen2 yarn": dict(model_type="qwen2", qkv_bias=True, rope_scaling=YARN, rope_theta=1000.0, head_dim=16),
    "yarn, all numbers": dict(rope_scaling=YarnRope(4.0, 50, 7.0, 0.5, attention_factor=1.6), head_dim=16),
    "qwen3": dict(model_type="qwen3", qk_norm=True, head_dim=16),
    "qwen3 tied, biases": dict(model_type="qwen3", qk_norm=True) | TIED | BIASES | dict(mlp_bias=False),
    "olmo2": OLMO2,
    "olmo2 biases": OLMO2 | dict(qkv_bias=True, output_bias=True, rope_scaling=YARN),
    "smollm3": SMOLLM3,
    "smollm3 tied, biases": SMOLLM3 | TIED | BIASES,
    "granite": GRANITE,
    "granite tied, biases": GRANITE | TIED | BIASES,
    "phi3": PHI3,
    "phi3, a window": PHI3 | dict(sliding_window=64),
    "phi3 long": PHI3 | dict(rope_scaling=LONG),
    "phi4 mini": PHI3
    | TIED
    | dict(partial_rotary_factor=0.75, head_dim=16, hidden_size=64)
    | dict(rope_scaling=LongRope(4.0, 64, short_factor=(1.0, 1.5, 2.0) * 2, long_factor=(9.0,) * 6)),
}
