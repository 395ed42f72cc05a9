"""Shapes of published models, for tables and benchmarks that need no weights. Source: their config.json."""

from minidpo.model import ModelConfig

_SIZES = {  # hidden, MLP, layers, query heads, key/value heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),  # Qwen2.5
    "1.5B": (1536, 8960, 28, 12, 2, 151_936, True),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False),
    "70B": (8192, 28672, 80, 64, 8, 128_256, False),  # Llama 3
}
SHAPES = tuple(_SIZES)


def published_shape(name: str) -> ModelConfig:
    """The config of one of SHAPES."""
    hidden, inner, layers, heads, kv_heads, vocabulary, tied = _SIZES[name]
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        model_type="llama" if name == "70B" else "qwen2",
        tie_word_embeddings=tied,
        qkv_bias=name != "70B",
    )
