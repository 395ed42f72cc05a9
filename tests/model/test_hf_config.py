"""config.json: every field that changes the numbers is read or refused by name."""

import json

import pytest
import torch

from minidpo.errors import UserError
from minidpo.model import load_model, read_config, save_model
from minidpo.model.hf_config import parse_config
from tiny import edit_config, tiny_model

TOKENS = torch.arange(40).view(2, 20)
SHRUNK = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
              bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
PLAIN = SHRUNK | dict(model_type="llama")
THETA = {"rope_type": "default", "rope_theta": 123.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip

ORIGINAL = "original_max_position_embeddings"
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"type": "yarn", "factor": 1.0, "original_max_position_embeddings": 64, "beta_fast": 32}


@pytest.mark.parametrize(
    "places", [[], ["rope_parameters"], ["rope_scaling"], ["rope_parameters", "rope_scaling"]]
)
def test_rope_theta(places):
    """It is found wherever transformers writes it."""
    assert parse_config(PLAIN | dict.fromkeys(places, THETA)).rope_theta == (123.0 if places else 10000.0)
    assert parse_config(PLAIN | dict.fromkeys(places, THETA) | {"rope_theta": 123.0}).rope_theta == 123.0


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; one of llama, mistral, qwen2, qwen3, olmo2, smollm3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'; one of default, linear"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": "2"}}, "factor is '2'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor is 4.0; high_freq_factor"),
        ({"rope_scaling": YARN | {"mscale": 0.7}}, "field 'mscale' = 0.7 is not known here"),
        ({"rope_scaling": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "factor is None"),
        ({"rope_theta": 1.5}, "rope_theta is 1.5 and 10000.0 in different places"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; a number above 1"),
        ({"rope_scaling": YARN | {"factor": 0}}, "factor is 0; a number above 0, below 1e18"),
        ({"rope_scaling": YARN | {"factor": 10**30}}, "a number above 0, below 1e18"),
        ({"rope_scaling": YARN | {"factor": 4, "beta_slow": 5e-324}}, "beta_slow is 5e-324"),
        ({"rope_scaling": YARN | {"factor": 4, "beta_slow": 32}}, "beta_fast is 32, beta_slow is 32;"),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 64}, "is 64 and, in rope_scaling, 32"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' = 0.5"),
        ({"embedding_multiplier": 12.0}, "'embedding_multiplier'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not read; give the original model"),
        ({"initializer_range": -1}, "initializer_range is -1; a number, at least 0 is needed"),
        ({"no_rope_layers": [1, 0]}, "'no_rope_layers'"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0; a number above 0"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1 entries; num_hidden"),
        ({"model_type": "smollm3", "no_rope_layers": [True, 0]}, "no_rope_layers is [True, 0]; a list"),
        ({"model_type": "phi3", "rope_scaling": YARN | {"factor": 4.0}}, "'yarn'; one of default, longrope"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.4}, "head_dim is 8, of which 3 are rotated"),
        ({"model_type": "phi3", "rope_scaling": LONG}, "original_max_position_embeddings is None"),
        (
            {"model_type": "phi3", "rope_scaling": LONG | {"long_factor": [1]}, ORIGINAL: 64},
            "4 and 1 numbers",
        ),
        ({"rope_scaling": True}, "rope_scaling is True; an object"),
        ({"layer_types": ["chunked_attention"]}, "layer_types is ['chunked_attention']"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"head_dim": None, "num_attention_heads": 64}, "head_dim is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
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
        {"_attn_implementation": "eager", "use_bfloat16": True, "gradient_checkpointing": True, "top_p": 0.9},
        {"cache_implementation": "hybrid", "use_cache": False, "is_decoder": True, "is_causal": True},
        {"tokenizer_class": "LlamaTokenizer", "mask_token_id": 4, "seq_length": 9, "stop_strings": ["a"]},
        {"partial_rotary_factor": 1.0, "rotary_pct": 1.0, "original_max_position_embeddings": 9},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": YARN},
        {"rope_scaling": False, "hidden_activation": "silu", "initializer_range": 0.0},
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


def test_unset():
    """Unknown fields that are unset are no error. A pad id that has no row is unset; YaRN's original length,
    where it is, is max_position_embeddings."""
    parse_config(PLAIN | {"logit_scale": None, "quantization_config": {}, "use_qk_norm": False})
    read = parse_config(PLAIN | {"pad_token_id": 61, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    assert read.pad_token_id is None
    assert read.rope_scaling.original_max_position_embeddings == read.max_position_embeddings


@pytest.mark.parametrize(
    ("over", "said"),
    [
        (dict(qkv_bias=True), "a llama model with output_bias = False beside its other fields"),
        (dict(model_type="qwen2"), "a qwen2 model with qkv_bias = False"),
        (dict(model_type="mistral", qk_norm=True), "a mistral model with qk_norm = True"),
    ],
)
def test_not_saved(tmp_path, over, said):
    """A model whose config.json would be read as another one is refused before anything is written."""
    with pytest.raises(UserError, match=f"^{said}"):
        save_model(tiny_model(**over), tmp_path)
    assert not any(tmp_path.iterdir())


SLIDES = dict(model_type="qwen3", sliding_window=16, use_sliding_window=True)


@pytest.mark.parametrize(
    "fields, limit",
    [
        (dict(model_type="mistral", sliding_window=16), 16),
        (dict(model_type="mistral", sliding_window=None), 5000),
        (SLIDES, 16),
        (SLIDES | dict(use_sliding_window=False), 5000),
        (SLIDES | dict(layer_types=["full_attention"] * 2), 5000),
    ],
)
def test_sliding_window(fields, limit):
    """It limits the length where a layer slides."""
    config = parse_config(SHRUNK | dict(max_position_embeddings=5000) | fields)
    assert config.max_length == limit


# config.json as published, but for the sizes and what has no part in the numbers.
PUBLISHED = {
    "SmolLM3-3B": dict(
        model_type="smollm3", attention_bias=False, layer_types=["full_attention"] * 4, max_window_layers=28,
        max_position_embeddings=65536, mlp_bias=False, no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0],
        num_key_value_heads=2, pretraining_tp=2, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0,
        sliding_window=None, use_sliding_window=False,
    ),
    "granite-3.1-2b-instruct": dict(
        model_type="granite", attention_dropout=0.1, attention_multiplier=0.015625, embedding_multiplier=12.0,
        logits_scaling=8.0, max_position_embeddings=131072, num_key_value_heads=2, residual_multiplier=0.22,
        rms_norm_eps=1e-05, rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=True,
    ),
    "Phi-4-mini-instruct": dict(
        model_type="phi3", full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
        max_position_embeddings=131072, num_key_value_heads=2, original_max_position_embeddings=4096,
        partial_rotary_factor=0.75, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=262144,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1, 1.118320672, 32.0]},
        tie_word_embeddings=True,
    ),
    "Qwen2.5-7B-Instruct, yarn switched on": dict(
        model_type="qwen2", max_position_embeddings=32768, max_window_layers=28, num_key_value_heads=2,
        rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, use_sliding_window=False,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        tie_word_embeddings=False,
    ),
    # Little more than sizes: the rest is as transformers has it for each family.
    **{
        name: dict(model_type=name, head_dim=8, num_key_value_heads=2, max_position_embeddings=9999)
        for name in ("mistral", "llama", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "phi3")
    },
}  # fmt: skip
LIMITS = [65536, 131072, 4096, 32768, 4096] + [9999] * 7


@pytest.mark.parametrize(("name", "limit"), [*zip(PUBLISHED, LIMITS, strict=True)])
def test_published(tmp_path, name, limit):
    """They are read as transformers reads them; long texts of windows and of LongRoPE are refused."""
    transformers = pytest.importorskip("transformers")
    fields = SHRUNK | PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()  # Granite has dropout
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(std=0.2)
        peer.save_pretrained(tmp_path / "saved")
        (tmp_path / "model.safetensors").symlink_to(tmp_path / "saved" / "model.safetensors")
        model = load_model(tmp_path)
        torch.testing.assert_close(model(TOKENS), peer(TOKENS).logits, rtol=1e-4, atol=1e-5)
    assert model.config.max_length == limit and read_config(tmp_path / "saved") == model.config
    save_model(model, tmp_path / "again")
    assert read_config(tmp_path / "again") == model.config
