"""Shapes of models by name, for tables and benchmarks that need no weights. Source: the published ones' config.json."""

from minidpo.model import ModelConfig

_SIZES = {  # hidden, MLP, layers, query heads, key/value heads, vocabulary, rotary base
    "A": (512, 1408, 8, 8, 8, 32_000, 1e4),
    "B": (256, 704, 6, 4, 4, 8_192, 1e4),
    "C": (576, 1536, 30, 9, 3, 49_152, 1e5),  # SmolLM2-135M
    "0.5B": (896, 4864, 24, 14, 2, 151_936, 1e6),  # Qwen2.5
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, 1e6),
    "7B": (3584, 18944, 28, 28, 4, 152_064, 1e6),
    "70B": (8192, 28672, 80, 64, 8, 128_256, 5e5),  # Llama 3
}
PUBLISHED = ("0.5B", "1.5B", "7B", "70B")


def named_shape(name: str) -> ModelConfig:
    """The config of one of the shapes above, without special tokens."""
    hidden, inner, layers, heads, kv_heads, vocabulary, rope_theta = _SIZES[name]
    qwen = name in ("0.5B", "1.5B", "7B")
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        model_type="qwen2" if qwen else "llama",
        rms_norm_eps=1e-6 if qwen else 1e-5,
        rope_theta=rope_theta,
        tie_word_embeddings=name not in ("7B", "70B"),
        qkv_bias=qwen,
    )
