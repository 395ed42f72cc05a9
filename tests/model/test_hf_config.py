"""config.json: every field that changes the numbers is read or refused by name."""

import pytest
import torch

from minidpo.errors import UserError
from minidpo.model import load_model, save_model
from tiny import edit_config, tiny_model

TOKENS = torch.arange(40).view(2, 20)
THETA = {"rope_type": "default", "rope_theta": 123.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip

YARN = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64, "beta_fast": 32, "mscale": 0.7}


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
def test_rope_theta(directory, fields):
    """It is found wherever transformers writes it."""

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
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, "is 64 and, in rope_scaling, 32"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5"),
        ({"is_causal": False}, "'is_causal' = False"),
        ({"logit_scale": 0.1}, "'logit_scale'"),
        ({"embedding_multiplier": 12.0}, "'embedding_multiplier'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read; give the original model"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantised weights are not read"),
        ({"hidden_activation": "gelu"}, "'hidden_activation' = 'gelu'"),
        ({"initializer_range": -1}, "initializer_range is -1; a number, at least 0 is needed"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": True}, "rope_scaling is True; an object"),
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


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation_autoset": True, "attn_implementation": "sdpa", "_flash_attn_2_enabled": True},
        {"_attn_implementation": "eager", "use_bfloat16": True, "gradient_checkpointing": True},
        {"cache_implementation": "hybrid", "use_cache": False, "is_decoder": True, "is_causal": True},
        {"tokenizer_class": "LlamaTokenizer", "mask_token_id": 4, "max_sequence_length": 9, "seq_length": 9},
        {"num_beams": 4, "length_penalty": 1.0, "top_p": 0.9, "min_p": 0.1, "no_repeat_ngram_size": 3},
        {"partial_rotary_factor": 1.0, "rotary_pct": 1.0, "original_max_position_embeddings": 9},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": YARN},
        {"rope_scaling": False, "hidden_activation": "silu", "initializer_range": 0.0},
        {"loss_type": "ForCausalLM", "save_step": 100, "use_unsloth": True, "router_aux_loss_coef": 0.001},
        {"guidance_scale": 1.5, "eos_token_ids": [2], "renormalize_logits": True, "stop_strings": ["a"]},
        {"rope_scaling": None, "rope_parameters": THETA | {"rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_ignored(directory, fields):
    """Fields that cannot change a number, and others at the value that changes none: as in transformers."""
    transformers = pytest.importorskip("transformers")
    before = load_model(directory)
    edit_config(directory, lambda config: config.update(fields))
    logits = load_model(directory)(TOKENS)
    assert torch.equal(logits, before(TOKENS))
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        torch.testing.assert_close(peer(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def test_unset(directory):
    """Unknown fields that are unset are no error."""
    unset = {"logit_scale": None, "quantization_config": {}, "use_qk_norm": False}
    edit_config(directory, lambda config: config.update(unset))
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
def test_sliding_window(tmp_path, fields, limit):
    """It limits the length where a layer slides."""
    qwen = fields["model_type"] == "qwen3"
    save_model(tiny_model(model_type=fields["model_type"], qk_norm=qwen), tmp_path)

    def replace(config: dict) -> None:
        for name in ("sliding_window", "use_sliding_window"):
            config.pop(name, None)
        config.update(fields, max_position_embeddings=5000)

    edit_config(tmp_path, replace)
    assert load_model(tmp_path).config.max_length == limit
