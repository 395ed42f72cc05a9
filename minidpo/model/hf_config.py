"""config.json of a Hugging Face model directory <-> ModelConfig; hf_fields.py knows its fields."""

import dataclasses
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import minidpo.model.hf_fields as hf
from minidpo.errors import UserError
from minidpo.files import read_object, require_model_file
from minidpo.model.model_config import ModelConfig
from minidpo.model.rotary import ROPE_SCALINGS, LongRope, RopeScaling
from minidpo.settings import Check, one_of


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
    family = hf.FAMILIES[_value(fields, "model_type", *hf.FIELDS["model_type"])]
    read = hf.FIELDS | family.own
    values = {name: _value(fields, name, check, default) for name, (check, default) in read.items()}
    harmless = " ".join(hf.HARMLESS.values()).split()
    _require_known({n: v for n, v in fields.items() if not any(fnmatchcase(n, p) for p in harmless)}, [*read])
    kind, layers, eos = values["model_type"], values["num_hidden_layers"], values["eos_token_id"]
    heads = values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    slides = values["use_sliding_window"] and "sliding_attention" in values["layer_types"]
    # Without the field transformers takes 4096, while null means no window; Phi-3 has none then.
    window = values["sliding_window"] if "sliding_window" in fields or kind == "phi3" else 4096
    bias = values["attention_bias"] and family.attention_bias
    values |= {
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "sliding_window": window if slides or kind in ("mistral", "phi3") else None,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": values["mlp_bias"] and family.mlp_bias,
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
    } | family.variant
    if "no_rope_layers" in values:
        given, interval = values["no_rope_layers"], values["no_rope_layer_interval"]
        if given is None:
            given = [int((i + 1) % interval != 0) for i in range(layers)]
        if len(given) < layers:
            raise ValueError(f"no_rope_layers has {len(given)} entries; num_hidden_layers is {layers}")
        values["no_rope_layers"] = tuple(given[:layers])
    # A pad id without a row is of no use here, and transformers would not open a model that is saved with it.
    if values["pad_token_id"] not in range(values["vocab_size"]):
        values["pad_token_id"] = None
    values |= _rope(values, family)
    return ModelConfig(**{name: values[name] for name in ModelConfig.__annotations__ if name in values})


def format_config(
    config: ModelConfig, sequence_classification: bool = False, dtype: str = "float32"
) -> dict[str, Any]:
    """The config.json that transformers opens as the same model: `parse_config` backwards."""
    head = "ForSequenceClassification" if sequence_classification else "ForCausalLM"
    family = hf.FAMILIES[config.model_type]
    fields: dict[str, Any] = {"architectures": [family.name + head], "dtype": dtype}
    fields |= {name: value for name, value in vars(config).items() if name in hf.FIELDS | family.own}
    fields |= {"hidden_act": "silu", "attention_bias": config.qkv_bias}
    # All layers slide, or none.
    fields |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    # In both places, because older transformers read rope_theta and rope_scaling, newer ones rope_parameters.
    rope, scaling = config.rope_scaling, dict[str, Any]()
    if rope:
        named = {"rope_type": rope.rope_type, **vars(rope)}
        scaling = {name: value for name, value in named.items() if value is not None}
    if isinstance(rope, LongRope):
        fields[hf.ORIGINAL] = rope.original_max_position_embeddings  # transformers would take 4096 without it
    fields["rope_scaling"] = scaling or None
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    if sequence_classification:
        fields |= {"num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
        fields["reward_read_at"] = "end of text"  # A run on text, not messages, says "EOS of text".
        # transformers reads the score at the last token that is not the pad token. Many models pad with EOS:
        # the score would be read one token early, before the EOS that minidpo scores.
        eos = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
        pads = (i for i in (config.pad_token_id, config.bos_token_id) if i not in (None, *eos))
        fields["pad_token_id"] = next(pads, None)
    return fields


def require_saveable(config: ModelConfig) -> None:
    """Raises UserError if the config.json of its model_type would be read as another model."""
    read = parse_config(json.loads(json.dumps(format_config(config))))
    for name, value in vars(config).items():
        if getattr(read, name) != value:
            what = f"a {config.model_type} model with {name} = {value!r} beside its other fields"
            became = f"would be read as one with {getattr(read, name)!r}"
            raise UserError(f"{what} {became}; another model_type may have it, as qwen2 has qkv_bias alone")


def _rope(values: dict[str, Any], family: hf.Family) -> dict[str, Any]:
    """The fields of ModelConfig that say how queries and keys are rotated."""
    places = (values, values["rope_parameters"], values["rope_scaling"])
    thetas = {_value(place, "rope_theta", hf.THETA, None) for place in places} - {None} or {family.rope_theta}
    if len(thetas) > 1:
        raise ValueError(f"rope_theta is {' and '.join(map(str, sorted(thetas)))} in different places")
    theta, rope = float(thetas.pop()), values["rope_scaling"] or values["rope_parameters"]
    share, known = "partial_rotary_factor", ["rope_type", "type", "rope_theta", *hf.ROPE_FIELDS]
    _require_known(rope, [*known, share] if share in family.own else known)
    rotated = _value(rope, share, hf.SHARE, values.get(share)) or 1.0
    size = int(values["head_dim"] * rotated)
    if size == 0 or size % 2:
        of_head = f", of which {size} are rotated" if rotated < 1 else ""
        raise ValueError(f"head_dim is {values['head_dim']}{of_head}; rotary embeddings need an even size")
    scaling = _rope_scaling(values, rope, family)
    factors = (scaling.short_factor, scaling.long_factor) if isinstance(scaling, LongRope) else ()
    if any(len(numbers) != size // 2 for numbers in factors):
        counts = " and ".join(str(len(numbers)) for numbers in factors)
        raise ValueError(f"short_factor and long_factor have {counts} numbers; {size // 2} are needed")
    return {"rope_theta": theta, "rope_scaling": scaling, "partial_rotary_factor": rotated}


def _rope_scaling(values: dict[str, Any], rope: dict[str, Any], family: hf.Family) -> RopeScaling | None:
    """The RopeScaling of the object `rope`, which is rope_scaling or rope_parameters."""
    kind = {"rope_type": rope.get("rope_type") or rope.get("type")}  # Older files have "type".
    neutral = rope.get("factor") == 1 and rope.get("attention_factor") in (None, 1)
    if kind["rope_type"] in ("linear", "dynamic", "yarn") and neutral:
        kind = {}  # Positions or frequencies are divided by it, or theta is multiplied by a function of it.
    name = _value(kind, "rope_type", one_of(*family.rope_types), "default")
    if name == "default":
        return None
    names = {field.name: field.default for field in dataclasses.fields(ROPE_SCALINGS[name])}
    outside, inside = values[hf.ORIGINAL], rope.get(hf.ORIGINAL)
    if hf.ORIGINAL in names and None not in (outside, inside) and outside != inside:
        raise ValueError(f"{hf.ORIGINAL} is {outside} and, in rope_scaling, {inside}")
    # What is absent is derived as in transformers, where the original length outside rope_scaling would win.
    given = rope | {hf.ORIGINAL: outside if inside is None else inside}
    if name == "yarn" and given[hf.ORIGINAL] is None:
        given[hf.ORIGINAL] = values["max_position_embeddings"]
    if name == "longrope" and given.get("factor") is None:
        given["factor"] = values["max_position_embeddings"] / _value(given, hf.ORIGINAL, hf.LENGTH, hf.NEEDED)
    read: dict[str, Any] = {}
    for field, default in names.items():
        needed = hf.NEEDED if default is dataclasses.MISSING else default
        value = _value(given, field, hf.ROPE_CHECKS.get(field, hf.NUMBER), needed)
        read[field] = tuple(value) if isinstance(value, list) else value
    for more, less in (("beta_fast", "beta_slow"), ("high_freq_factor", "low_freq_factor")):
        if more in read and read[more] <= read[less]:
            raise ValueError(f"{more} is {read[more]}, {less} is {read[less]}; {more} must be the larger one")
    return ROPE_SCALINGS[name](**read)


def _value(fields: dict[str, Any], name: str, check: Check, default: Any) -> Any:
    """The value of a field, or its default. Raises ValueError for a value that it may not hold."""
    value = fields.get(name)
    if (value is None or value is False and check is hf.OBJECT) and default is not hf.NEEDED:
        return default
    if not check.test(value):
        raise ValueError(f"{name} is {value!r}; {check.must} is needed")
    return value


def _require_known(fields: dict[str, Any], known: list[str]) -> None:
    for name, value in fields.items():
        if name in known or value is None or name in hf.NEUTRAL and value == hf.NEUTRAL[name]:
            continue
        if name in hf.QUANTISED and value:
            raise ValueError(f"field {name!r}: quantised weights are not read; give the original model")
        if name in hf.NEUTRAL:
            raise ValueError(
                f"field {name!r} = {value!r} changes the numbers; {hf.NEUTRAL[name]} alone is read"
            )
        if value not in (False, {}, []):
            raise ValueError(f"field {name!r} = {value!r} is not known here and might change the numbers")
