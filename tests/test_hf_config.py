"""config.json: every field that changes the numbers is read or refused by name."""

import pytest

from minidpo.errors import UserError
from minidpo.weights import load_model, save_model
from tiny import edit_config, tiny_model


@pytest.mark.parametrize("place", ["top", "rope_parameters", "rope_scaling", "both", "neither"])
def test_rope_theta_is_found_wherever_transformers_writes_it(tmp_path, place):
    model = tiny_model(rope_theta=10000.0 if place == "neither" else 123.0)
    save_model(model, tmp_path)

    def move(fields: dict) -> None:
        theta = fields["rope_theta"]
        inner = {"rope_type": "default", "rope_theta": theta}
        for name in ("rope_theta", "rope_parameters", "rope_scaling"):
            del fields[name]
        if place in ("top", "both"):
            fields["rope_theta"] = theta
        if place in ("rope_parameters", "both"):
            fields["rope_parameters"] = inner
        if place == "rope_scaling":
            fields["rope_scaling"] = inner

    edit_config(tmp_path, move)
    assert load_model(tmp_path).config.rope_theta == model.config.rope_theta


LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": None}, "model_type None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling of type 'linear'"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "type 'dynamic'"),
        ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "factor is None"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0 at the top and 10000.0 in rope_parameters"),
        ({"logit_scale": 0.1}, "'logit_scale'"),
        ({"embedding_multiplier": 12.0}, "'embedding_multiplier'"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config'"),
        ({"layer_types": ["chunked_attention"]}, "layer_types"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ],
)
def test_a_config_that_cannot_be_computed_is_an_error_that_names_the_field(directory, fields, named):
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
