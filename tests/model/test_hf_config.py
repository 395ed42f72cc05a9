"""config.json: every field that changes the numbers is read or refused by name."""

import pytest

from minidpo.errors import UserError
from minidpo.model import load_model, save_model
from tiny import edit_config, tiny_model

THETA = {"rope_type": "default", "rope_theta": 123.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 123.0},
        {"rope_parameters": THETA},
        {"rope_scaling": THETA},
        {"rope_theta": 123.0, "rope_parameters": THETA},
        {},
    ],
    ids=str,
)
def test_rope_theta_is_found_wherever_transformers_writes_it(directory, fields):
    def replace(config: dict) -> None:
        for name in ("rope_theta", "rope_parameters", "rope_scaling"):
            del config[name]
        config.update(fields)

    edit_config(directory, replace)
    assert load_model(directory).config.rope_theta == (123.0 if fields else 10000.0)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; one of llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'; one of default, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "factor is None"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0 and 10000.0 in different places"),
        ({"logit_scale": 0.1}, "'logit_scale'"),
        ({"embedding_multiplier": 12.0}, "'embedding_multiplier'"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"layer_types": ["chunked_attention"]}, "layer_types is ['chunked_attention']"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"head_dim": None, "num_attention_heads": 64}, "head_dim is 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id is [1, '</s>']"),
    ],
)
def test_unsupported_config(directory, fields, named):
    """The error names the field."""
    edit_config(directory, lambda config: config.update(fields))
    with pytest.raises(UserError, match="config.json") as error:
        load_model(directory)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_unset_unknown_fields_are_no_error(directory):
    edit_config(directory, lambda config: config.update(logit_scale=None, quantization_config={}))
    load_model(directory)


@pytest.mark.parametrize(
    "fields, limit",
    [
        (dict(model_type="mistral", sliding_window=16), 16),
        (dict(model_type="mistral", sliding_window=None), 5000),
        (dict(model_type="mistral"), 4096),  # what transformers assumes
        (dict(model_type="llama", sliding_window=16), 5000),  # Llama has none
        (dict(model_type="qwen3", sliding_window=16, use_sliding_window=True), 16),
        (dict(model_type="qwen3", sliding_window=16, use_sliding_window=False), 5000),
        (dict(model_type="qwen3", sliding_window=16, use_sliding_window=True,
              layer_types=["full_attention"] * 2), 5000),
    ],
)  # fmt: skip
def test_a_sliding_window_limits_the_length_where_a_layer_slides(tmp_path, fields, limit):
    qwen = fields["model_type"] == "qwen3"
    save_model(tiny_model(model_type=fields["model_type"], qk_norm=qwen), tmp_path)

    def replace(config: dict) -> None:
        for name in ("sliding_window", "use_sliding_window"):
            config.pop(name, None)
        config.update(fields, max_position_embeddings=5000)

    edit_config(tmp_path, replace)
    assert load_model(tmp_path).config.max_length == limit
