"""config.json of a Hugging Face model directory <-> ModelConfig.

A field that would change the numbers and is not computed here is an error that names it; nothing is ignored
but what is listed in HARMLESS, or is unset (null, false, empty).
"""

from pathlib import Path
from typing import Any

from minidpo.errors import UserError
from minidpo.files import read_object, require_file
from minidpo.model import Llama3Rope, ModelConfig

ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}

# Read below, or without influence on the logits of a model in evaluation.
READ = frozenset("""model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings sliding_window use_sliding_window max_window_layers
    layer_types rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings attention_bias mlp_bias
    hidden_act initializer_range bos_token_id eos_token_id pad_token_id""".split())  # fmt: skip
READ_OF_ROPE = frozenset("""rope_type type rope_theta factor low_freq_factor high_freq_factor
    original_max_position_embeddings""".split())  # fmt: skip
HARMLESS = frozenset("""architectures torch_dtype dtype transformers_version use_cache attention_dropout
    embd_pdrop resid_pdrop hidden_dropout pretraining_tp _name_or_path name_or_path model_max_length id2label
    label2id num_labels problem_type is_llama_config transformers.js_config unsloth_fixed unsloth_version
    output_attentions output_hidden_states return_dict return_dict_in_generate task_specific_params auto_map
    finetuning_task unk_token_id sep_token_id cls_token_id decoder_start_token_id classifier_dropout
    max_length min_length do_sample temperature top_k top_p repetition_penalty""".split())  # fmt: skip

_WIDEST = 2**24  # far above any model; two such sizes still multiply without overflow


def read_config(directory: Path) -> ModelConfig:
    """The ModelConfig of a model directory. Raises UserError, naming the field, for what cannot be computed."""
    inside = directory / "final"  # of a run's directory
    hint = f"; {inside} is one" if (inside / "config.json").is_file() else ""
    path = require_file(directory / "config.json", f"a Hugging Face model directory is needed{hint}")
    fields = read_object(path)
    try:
        return parse_config(fields)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def parse_config(fields: dict[str, Any]) -> ModelConfig:
    """ModelConfig from config.json's fields. Raises ValueError that names the field."""
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(f"model_type {family!r} is not supported; one of {', '.join(ARCHITECTURES)} is")
    for name, value in fields.items():
        if name not in READ | HARMLESS and value not in (None, False, {}, []):
            raise ValueError(f"field {name!r} = {value!r} is not known here and might change the numbers")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act {fields['hidden_act']!r} is not supported; 'silu' is")
    width = _positive(fields, "hidden_size", most=_WIDEST)
    heads = _positive(fields, "num_attention_heads", most=_WIDEST)
    kv_heads = _positive(fields, "num_key_value_heads", heads)
    head_dim = _positive(fields, "head_dim", width // heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    layers = _positive(fields, "num_hidden_layers", most=10_000)
    if heads * head_dim > _WIDEST:
        raise ValueError(f"num_attention_heads {heads} times head_dim {head_dim} is above {_WIDEST}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings need an even size")
    theta, scaling = _rope(fields)
    attention_bias = _flag(fields, "attention_bias")
    return ModelConfig(
        model_type=family,
        vocab_size=_positive(fields, "vocab_size", most=_WIDEST),
        hidden_size=width,
        intermediate_size=_positive(fields, "intermediate_size", most=_WIDEST),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_positive(fields, "max_position_embeddings", 2048),
        sliding_window=_sliding_window(fields, family),
        rms_norm_eps=_number(fields, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
        qkv_bias=True if family == "qwen2" else family != "mistral" and attention_bias,
        output_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and _flag(fields, "mlp_bias"),
        qk_norm=family == "qwen3",
        initializer_range=_number(fields, "initializer_range", 0.02),
        bos_token_id=_id(fields, "bos_token_id"),
        eos_token_id=_id(fields, "eos_token_id", several=True),
        pad_token_id=_id(fields, "pad_token_id"),
    )


def format_config(config: ModelConfig, sequence_classification: bool = False) -> dict[str, Any]:
    """The config.json that transformers opens as the same model: `parse_config` backwards."""
    family = ARCHITECTURES[config.model_type]
    head = "ForSequenceClassification" if sequence_classification else "ForCausalLM"
    fields: dict[str, Any] = {"architectures": [family + head], "hidden_act": "silu", "dtype": "float32"}
    same = ("model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
            " num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings"
            " initializer_range bos_token_id eos_token_id pad_token_id")  # fmt: skip
    fields |= {name: getattr(config, name) for name in same.split()}
    # Written in both places: older transformers read rope_theta and rope_scaling, newer ones rope_parameters.
    fields["rope_theta"] = config.rope_theta
    scaling = vars(config.rope_scaling) if config.rope_scaling else {}
    fields["rope_scaling"] = {"rope_type": "llama3", **scaling} if scaling else None
    fields["rope_parameters"] = {
        "rope_type": "llama3" if scaling else "default",
        "rope_theta": config.rope_theta,
        **scaling,
    }
    if config.model_type in ("llama", "qwen3"):
        fields["attention_bias"] = config.qkv_bias
    if config.model_type == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral" or config.sliding_window:
        fields["sliding_window"] = config.sliding_window
    if config.model_type.startswith("qwen"):
        fields["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window:
            fields["max_window_layers"] = 0
    if sequence_classification:
        fields |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        fields["pad_token_id"] = _classification_pad(config)
    return fields


def _classification_pad(config: ModelConfig) -> int | None:
    """A pad id that never ends a text: transformers reads the score at the last token that is not padding.

    Many models pad with EOS; the score would then be read one token early, before the EOS that minidpo scores.
    """
    eos = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    return next(
        (i for i in (config.pad_token_id, config.bos_token_id) if i is not None and i not in eos), None
    )


def _rope(fields: dict[str, Any]) -> tuple[float, Llama3Rope | None]:
    parameters, scaling = (fields.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ValueError(f"rope_parameters {parameters!r}, rope_scaling {scaling!r}: objects are needed")
    theta = _number(scaling | parameters | fields, "rope_theta", 10000.0)  # transformers' own default
    if (
        "rope_theta" in parameters
        and "rope_theta" in fields
        and fields["rope_theta"] != parameters["rope_theta"]
    ):
        raise ValueError(
            f"rope_theta is {fields['rope_theta']} at the top and {parameters['rope_theta']} in rope_parameters"
        )
    parameters = scaling or parameters
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_scaling of type {kind!r} is not supported; 'default' and 'llama3' are")
    for name, value in parameters.items():
        if name not in READ_OF_ROPE and value is not None:
            raise ValueError(f"field {name!r} = {value!r} of the rope parameters is not known here")
    if kind == "default":
        return theta, None
    return theta, Llama3Rope(
        _number(parameters, "factor"),
        _number(parameters, "low_freq_factor"),
        _number(parameters, "high_freq_factor"),
        _positive(parameters, "original_max_position_embeddings"),
    )


def _sliding_window(fields: dict[str, Any], family: str) -> int | None:
    """The window below which sliding attention is full attention; None where no layer slides."""
    slides = family == "mistral" or _flag(fields, "use_sliding_window")
    if fields.get("layer_types") is not None:
        kinds = fields["layer_types"]
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"layer_types is {kinds!r}; a list of names is needed")
        kinds = set(kinds)
        if kinds - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types {sorted(kinds)} is not supported; full and sliding attention are")
        slides = slides and "sliding_attention" in kinds or family == "mistral"
    # Of a Mistral config that leaves it out, transformers makes a window of 4096; null means none.
    if not slides or fields.get("sliding_window", 4096) is None:
        return None
    return _positive(fields, "sliding_window", 4096)


def _positive(fields: dict[str, Any], name: str, default: int | None = None, most: int = 2**31) -> int:
    value = fields.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}; a whole number from 1 to {most} is needed")
    return value


def _number(fields: dict[str, Any], name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ValueError(f"{name} is {value!r}; a number above 0 is needed")
    return float(value)


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; true or false is needed")
    return bool(value)


def _id(fields: dict[str, Any], name: str, several: bool = False) -> Any:
    """A token id or none; with `several` also a tuple of them."""
    value = fields.get(name)
    ids = value if several and isinstance(value, list) else [value]
    if not all(i is None or isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{name} is {value!r}; a token id is needed")
    return tuple(value) if isinstance(value, list) else value
