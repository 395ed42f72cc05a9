"""config.json of a Hugging Face model directory <-> ModelConfig.

A field that would change the numbers and is not supported here is an error that names it. Only fields in
HARMLESS, those in NEUTRAL at their neutral value, and unset ones (null, false, empty) are ignored.
"""

from pathlib import Path
from typing import Any

from minidpo.errors import UserError
from minidpo.files import read_object, require_model_file
from minidpo.model.transformer import Llama3Rope, ModelConfig
from minidpo.settings import Check, one_of

REWARD_LABEL = {"0": "reward"}  # by which a reward model of `format_config` is known
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# What a field may hold. It is `type(...) is`, because isinstance takes JSON's true for a whole number. The
# largest weight has heads x head_dim x hidden_size entries: the product of three sizes must fit 64 bits.
_SIZE = Check(lambda value: type(value) is int and 1 <= value <= 2**20, "a whole number from 1 to 2**20")
_DEPTH = Check(lambda value: type(value) is int and 1 <= value <= 1000, "a whole number from 1 to 1000")
_LENGTH = Check(lambda value: type(value) is int and 1 <= value <= 2**31, "a whole number from 1 to 2**31")
_NUMBER = Check(lambda value: type(value) in (int, float) and 0 < value < 1e300, "a number above 0")
_SPREAD = Check(lambda value: type(value) in (int, float) and 0 <= value < 1e300, "a number, at least 0")
_FLAG = Check(lambda value: type(value) is bool, "true or false")
_ID = Check(lambda value: type(value) is int, "a token id")
_IDS = Check(lambda value: all(map(_ID.test, value if isinstance(value, list) else [value])), "token ids")
_OBJECT = Check(lambda value: isinstance(value, dict), "an object")
_LAYER = one_of("full_attention", "sliding_attention")
_LAYERS = Check(lambda value: type(value) is list and all(map(_LAYER.test, value)), f"a list, {_LAYER.must}")

_NEEDED = object()
# Every field that is read -> what it may hold, and what it is if it is absent or null, as in transformers.
FIELDS: dict[str, tuple[Check, Any]] = {
    name: (check, default)
    for names, check, default in (
        ("model_type", one_of(*ARCHITECTURES), _NEEDED),
        ("vocab_size hidden_size intermediate_size num_attention_heads", _SIZE, _NEEDED),
        ("num_hidden_layers", _DEPTH, _NEEDED),
        ("num_key_value_heads head_dim", _SIZE, None),
        ("max_position_embeddings", _LENGTH, 2048),
        ("use_sliding_window tie_word_embeddings attention_bias mlp_bias", _FLAG, False),
        ("sliding_window original_max_position_embeddings", _LENGTH, None),
        ("layer_types", _LAYERS, ["sliding_attention"]),
        ("rope_theta", _NUMBER, None),
        ("rope_parameters rope_scaling", _OBJECT, {}),
        ("rms_norm_eps", _NUMBER, 1e-6),
        ("initializer_range", _SPREAD, 0.02),
        ("hidden_act", one_of("silu", "swish"), "silu"),
        ("bos_token_id pad_token_id", _ID, None),
        ("eos_token_id", _IDS, None),
    )
    for name in names.split()
}
# Fields that are ignored, because none changes the logits of a given text, by the reason.
HARMLESS = {
    "it says where the weights come from, or how they are stored, which the tensors say themselves": """
        architectures torch_dtype dtype use_bfloat16 transformers_version transformers.js_config auto_map
        _name_or_path name_or_path base_model_name_or_path _commit_hash _from_model_config is_llama_config
        unsloth_fixed unsloth_version use_unsloth torchscript tf_legacy_loss""",
    "it chooses a kernel, or what a forward pass keeps and returns": """
        _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation
        _experts_implementation experts_implementation _flash_attn_2_enabled flash_attn_2_enabled
        use_flash_attention use_flash_attention_2 use_flash_attn use_sdpa use_cache cache_implementation
        cache_config use_cache_quantization use_cache_kernel pretraining_tp output_attentions
        output_hidden_states return_dict""",
    "it is of training: dropout, which no model has here, recomputing, and how weights began": """
        attention_dropout attn_pdrop attention_probs_dropout_prob embd_pdrop embedding_dropout resid_pdrop
        residual_dropout hidden_dropout hidden_dropout_prob dropout classifier_dropout initializer_factor
        gradient_checkpointing gradient_checkpointing_kwargs neftune_noise_alpha
        loss_type save_step output_router_logits router_aux_loss_coef""",
    "texts are kept below max_position_embeddings and the sliding window, whatever it says": """
        max_window_layers max_sequence_length max_seq_length max_seq_len seq_length seq_len n_ctx
        model_max_length tokenizer_model_max_length""",
    "it is of a tokenizer, of labels or of a task": """
        tokenizer_class processor_class prefix unk_token_id sep_token_id cls_token_id mask_token_id
        decoder_start_token_id id2label label2id num_labels problem_type reward_read_at finetuning_task
        task_specific_params value_head_prefix""",
    "it is of sampling; generation_config.json has it today": """
        max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams
        num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff
        repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences return_dict_in_generate
        output_scores forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
        target_lookbehind guidance_scale renormalize_logits stop_strings eos_token_ids
        generation_config""",
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
    "logit_scale": 1,
    "logits_scaling": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
}

YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # of rope_type yarn alone
QUANTISED = ("quantization_config", "quantization", "compression_config")


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a model directory. Raises UserError, naming the field, for what is not supported."""
    path = require_model_file(directory, "config.json")
    fields = read_object(path)
    try:
        return parse_config(fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def parse_config(fields: dict[str, Any]) -> ModelConfig:
    """ModelConfig from config.json's fields. Raises ValueError that names the field."""
    values = {name: _value(fields, name, check, default) for name, (check, default) in FIELDS.items()}
    _require_known(fields, [*FIELDS, *" ".join(HARMLESS.values()).split()])
    family, heads, eos = values["model_type"], values["num_attention_heads"], values["eos_token_id"]
    kv_heads = values["num_key_value_heads"] or heads
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim == 0 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embeddings need an even size")
    slides = values["use_sliding_window"] and "sliding_attention" in values["layer_types"]
    # Without the field transformers takes 4096, while null means no window.
    window = values["sliding_window"] if "sliding_window" in fields else 4096
    bias = values["attention_bias"] and family in ("llama", "qwen3")
    values |= {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "sliding_window": window if slides or family == "mistral" else None,
        "qkv_bias": bias or family == "qwen2",
        "output_bias": bias,
        "mlp_bias": values["mlp_bias"] and family == "llama",
        "qk_norm": family == "qwen3",
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
    }
    # A pad id without a row is of no use here, and transformers would not open a model that is saved with it.
    if values["pad_token_id"] not in range(values["vocab_size"]):
        values["pad_token_id"] = None
    values["rope_theta"], values["rope_scaling"] = _rope(values)
    return ModelConfig(**{name: values[name] for name in ModelConfig.__annotations__})


def format_config(
    config: ModelConfig, sequence_classification: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """The config.json that transformers opens as the same model: `parse_config` backwards."""
    head = "ForSequenceClassification" if sequence_classification else "ForCausalLM"
    fields: dict[str, Any] = {"architectures": [ARCHITECTURES[config.model_type] + head], "dtype": dtype}
    fields |= {name: value for name, value in vars(config).items() if name in FIELDS}
    fields |= {"hidden_act": "silu", "attention_bias": config.qkv_bias}
    # All layers slide, or none.
    fields |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    # In both places, because older transformers read rope_theta and rope_scaling, newer ones rope_parameters.
    scaling = {"rope_type": "llama3", **vars(config.rope_scaling)} if config.rope_scaling else {}
    fields["rope_scaling"] = scaling or None
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    if sequence_classification:
        fields |= {"num_labels": 1, "id2label": REWARD_LABEL, "label2id": {"reward": 0}}
        fields["reward_read_at"] = "end of text"  # as transformers reads it; without this field, at EOS
        # transformers reads the score at the last token that is not the pad token. Many models pad with EOS:
        # the score would be read one token early, before the EOS that minidpo scores.
        eos = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
        pads = (i for i in (config.pad_token_id, config.bos_token_id) if i not in (None, *eos))
        fields["pad_token_id"] = next(pads, None)
    return fields


def _rope(values: dict[str, Any]) -> tuple[float, Llama3Rope | None]:
    places = (values, values["rope_parameters"], values["rope_scaling"])
    thetas = {_value(place, "rope_theta", _NUMBER, None) for place in places} - {None} or {10000.0}
    if len(thetas) > 1:
        raise ValueError(f"rope_theta is {' and '.join(map(str, sorted(thetas)))} in different places")
    theta = float(thetas.pop())
    rope, numbers = values["rope_scaling"] or values["rope_parameters"], Llama3Rope.__annotations__
    _require_known(rope, ["rope_type", "type", "rope_theta", *numbers, *YARN])
    kind = {"rope_type": rope.get("rope_type") or rope.get("type")}  # Older files have "type".
    if kind["rope_type"] in ("linear", "dynamic", "yarn") and rope.get("factor") == 1:
        kind = {}  # Positions or frequencies are divided by it, or theta is multiplied by a function of it.
    if _value(kind, "rope_type", one_of("default", "llama3"), "default") == "default":
        return theta, None
    llama3 = Llama3Rope(**{name: _value(rope, name, _NUMBER, _NEEDED) for name in numbers})
    name = "original_max_position_embeddings"  # transformers lets that outside rope_scaling win.
    if values[name] not in (None, getattr(llama3, name)):
        raise ValueError(f"{name} is {values[name]} and, in rope_scaling, {getattr(llama3, name)}")
    return theta, llama3


def _value(fields: dict[str, Any], name: str, check: Check, default: Any) -> Any:
    """The value of a field, or its default. Raises ValueError for a value that it may not hold."""
    value = fields.get(name)
    if (value is None or value is False and check is _OBJECT) and default is not _NEEDED:
        return default
    if not check.test(value):
        raise ValueError(f"{name} is {value!r}; {check.must} is needed")
    return value


def _require_known(fields: dict[str, Any], known: list[str]) -> None:
    for name, value in fields.items():
        if name in known or value is None or name in NEUTRAL and value == NEUTRAL[name]:
            continue
        if name in QUANTISED and value:
            raise ValueError(f"field {name!r}: quantised weights are not read; give the original model")
        if name in NEUTRAL:
            raise ValueError(f"field {name!r} = {value!r} changes the numbers; {NEUTRAL[name]} alone is read")
        if value not in (False, {}, []):
            raise ValueError(f"field {name!r} = {value!r} is not known here and might change the numbers")
