"""The fields of config.json: what each may hold, and which do not matter.

A field that would change the numbers and is not supported here is an error that names it. Only fields in
HARMLESS, those in NEUTRAL at their neutral value, and unset ones (null, false, empty) are ignored.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from minidpo.model.rotary import ROPE_SCALINGS
from minidpo.settings import Check, one_of

# What a field may hold. It is `type(...) is`, because isinstance takes JSON's true for a whole number. The
# largest weight has heads x head_dim x hidden_size entries: the product of three sizes must fit 64 bits.
SIZE = Check(lambda value: type(value) is int and 1 <= value <= 2**20, "a whole number from 1 to 2**20")
DEPTH = Check(lambda value: type(value) is int and 1 <= value <= 1000, "a whole number from 1 to 1000")
LENGTH = Check(lambda value: type(value) is int and 2 <= value <= 2**31, "a whole number from 2 to 2**31")
NUMBER = Check(
    lambda value: type(value) in (int, float) and 1e-18 < value < 1e18, "a number above 0, below 1e18,"
)
THETA = Check(lambda value: NUMBER.test(value) and value > 1, "a number above 1")
SPREAD = Check(lambda value: type(value) in (int, float) and 0 <= value < 1e18, "a number, at least 0")
FLAG = Check(lambda value: type(value) is bool, "true or false")
ID = Check(lambda value: type(value) is int, "a token id")
IDS = Check(lambda value: all(map(ID.test, value if isinstance(value, list) else [value])), "token ids")
OBJECT = Check(lambda value: isinstance(value, dict), "an object")
SHARE = Check(lambda value: NUMBER.test(value) and value <= 1, "a number above 0, at most 1")


def list_of(item: Check) -> Check:
    return Check(
        lambda value: type(value) is list and all(map(item.test, value)), f"a list, each {item.must},"
    )


LAYERS = list_of(one_of("full_attention", "sliding_attention"))
ROTATED = list_of(Check(lambda value: type(value) is int and value in (0, 1), "1 if a layer rotates, else 0"))
NEEDED = object()
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Family:
    """A `model_type`: how transformers names its classes, and in what its config.json differs from others."""

    name: str
    attention_bias: bool = True  # whether its classes read attention_bias,
    mlp_bias: bool = False  # and mlp_bias
    variant: dict[str, bool] = field(default_factory=dict)  # fields of ModelConfig that no file has
    own: dict[str, tuple[Check, Any]] = field(default_factory=dict)  # read as FIELDS are, or otherwise
    rope_theta: float = 1e4  # if none is given anywhere
    rope_types: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


# Gemma (norms by 1 + weight, GELU, capped logits, windows), mixtures of experts and hybrids with recurrent
# layers are not this decoder with other settings: they are refused by their model_type.
MULTIPLIERS = [f"{name}_multiplier" for name in ("embedding", "attention", "residual")]
FAMILIES = {
    "llama": Family("Llama", mlp_bias=True),
    "mistral": Family("Mistral", attention_bias=False),
    "qwen2": Family("Qwen2", attention_bias=False, variant={"qkv_bias": True}),
    "qwen3": Family("Qwen3", variant={"qk_norm": True}),
    "olmo2": Family(
        "Olmo2",
        variant={"qk_norm_whole": True, "norm_after": True},
        own={"rms_norm_eps": (NUMBER, 1e-5)},
    ),
    "smollm3": Family(
        "SmolLM3",
        mlp_bias=True,
        own=dict(
            no_rope_layers=(ROTATED, None), no_rope_layer_interval=(SIZE, 4), tie_word_embeddings=(FLAG, True)
        ),
        rope_theta=2e6,
    ),
    "granite": Family(
        "Granite", mlp_bias=True, own=dict.fromkeys([*MULTIPLIERS, "logits_scaling"], (NUMBER, 1.0))
    ),
    "phi3": Family(
        "Phi3",
        attention_bias=False,
        variant={"fused_projections": True},
        own={"partial_rotary_factor": (SHARE, None), "rms_norm_eps": (NUMBER, 1e-5)},
        rope_types=("default", "longrope"),
    ),
}
# Every field that is read, of all families -> what it may hold, and what it is if it is absent or null: as in
# transformers, but for sizes of heads and the length, which every saved file has: they are Llama's for all.
FIELDS: dict[str, tuple[Check, Any]] = {
    name: (check, default)
    for names, check, default in (
        ("model_type", one_of(*FAMILIES), NEEDED),
        ("vocab_size hidden_size intermediate_size num_attention_heads", SIZE, NEEDED),
        ("num_hidden_layers", DEPTH, NEEDED),
        ("num_key_value_heads head_dim", SIZE, None),
        ("max_position_embeddings", LENGTH, 2048),
        ("use_sliding_window tie_word_embeddings attention_bias mlp_bias", FLAG, False),
        ("sliding_window original_max_position_embeddings", LENGTH, None),
        ("layer_types", LAYERS, ["sliding_attention"]),
        ("rope_theta", THETA, None),
        ("rope_parameters rope_scaling", OBJECT, {}),
        ("rms_norm_eps", NUMBER, 1e-6),
        ("initializer_range", SPREAD, 0.02),
        ("hidden_act", one_of("silu", "swish"), "silu"),
        ("bos_token_id pad_token_id", ID, None),
        ("eos_token_id", IDS, None),
    )
    for name in names.split()
}
# Fields that are ignored, because none changes the logits of a given text, by the reason; * is anything.
HARMLESS = {
    "it says where the weights come from, or how they are stored, which the tensors say themselves": """
        architectures torch_dtype dtype use_bfloat16 transformers_version transformers.js_config auto_map
        *name_or_path _commit_hash _from_model_config is_llama_config *unsloth* torchscript tf_legacy_loss""",
    "it chooses a kernel, or what a forward pass keeps and returns": """
        *attn_implementation* *experts_implementation *flash_att* use_sdpa use_cache* cache_*
        pretraining_tp output_attentions output_hidden_states return_dict""",
    "it is of training: dropout, which no model has here, recomputing, and how weights began": """
        *dropout *dropout_prob *_pdrop initializer_factor gradient_checkpointing* neftune_noise_alpha
        loss_type save_step output_router_logits router_aux_loss_coef""",
    "texts are kept below max_position_embeddings and the sliding window, whatever it says": """
        max_window_layers max_seq* seq_len* n_ctx *model_max_length""",
    "it is of a tokenizer, of labels or of a task": """
        tokenizer_class processor_class prefix *_token_id *_token_ids id2label label2id num_labels
        problem_type reward_read_at finetuning_task task_specific_params value_head_prefix""",
    "it is of sampling; generation_config.json has it today": """
        max_length min_length m*_new_tokens do_sample early_stopping num_beam* temperature top_k top_p min_p
        typical_p *_cutoff *_penalty *ngram_size bad_words_ids num_return_sequences output_scores
        return_dict_in_generate remove_invalid_values *suppress_tokens *assistant* *_lookbehind
        guidance_scale renormalize_logits stop_strings generation_config""",
    "these models are decoders whatever it says": "is_decoder",
}
# Fields of which one value changes nothing, such as a factor of 1.
NEUTRAL: dict[str, Any] = {
    "is_causal": True,
    "hidden_activation": "silu",
    "partial_rotary_factor": 1,
    "rotary_pct": 1,
    "rope_ratio": 1,
    "attention_factor": 1,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "logit_scale": 1,
    "logits_scaling": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
}

# What the fields of a RopeScaling may hold; the others are numbers.
ROPE_CHECKS = {**dict.fromkeys(("short_factor", "long_factor"), list_of(NUMBER)), ORIGINAL: LENGTH}
ROPE_FIELDS = {field.name for scaling in ROPE_SCALINGS.values() for field in fields(scaling)}
QUANTISED = ("quantization_config", "quantization", "compression_config")
