"""What the families' readers of `config.json` have in common: numbers, refusals by name, and rope."""

import dataclasses
import reprlib
from collections.abc import Mapping

from jax_backtrack.errors import InputError
from jax_backtrack.models.rope import Llama3Scaling
from jax_backtrack.models.transformer import TransformerConfig
from jax_backtrack.utils.console import warn

_MOST_LAYERS = 10_000  # a file that claims more is wrong, and their names alone would fill the memory
_MOST = 2**31 - 1  # of every other size: indices are int32
_MOST_NUMBER = 1e38  # of other numbers, which float32 has to hold

# Settings of the rotary embedding that change nothing at these values.
_NEUTRAL = {"factor": 1.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
# Types that are the plain embedding at a factor of 1, and what else they look at.
_STRETCHED = ("linear", "yarn")
_ALSO_STRETCH = ("attention_factor", "mscale", "mscale_all_dim")

_QUANTISED = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's
_DEQUANTISE = {
    "bitsandbytes": "; or dequantise them in transformers: model.dequantize(), then save_pretrained",
    "fp8": "; or dequantise them in transformers: from_pretrained(..., "
    "quantization_config=FineGrainedFP8Config(dequantize=True)), then save_pretrained",
    "mxfp4": "; or dequantise them in transformers: from_pretrained(..., "
    "quantization_config=Mxfp4Config(dequantize=True)), then save_pretrained",
    "compressed-tensors": "; or dequantise them in transformers: from_pretrained(..., "
    "quantization_config=CompressedTensorsConfig(dequantize=True)), then save_pretrained",
    "gptq": ", in 16 bits: transformers does not dequantise GPTQ",
    "awq": ", in 16 bits: transformers does not dequantise AWQ",
}


def read_common(config: Mapping) -> dict:
    """Returns the fields of `TransformerConfig` that every family reads alike."""
    refuse_what_no_family_has(config)
    theta, scaling = read_rope(config)
    return dict(
        vocab_size=read_size(config, "vocab_size"),
        hidden_size=read_size(config, "hidden_size"),
        intermediate_size=read_size(config, "intermediate_size"),
        num_hidden_layers=read_size(config, "num_hidden_layers", most=_MOST_LAYERS),
        num_attention_heads=read_size(config, "num_attention_heads"),
        rms_norm_eps=read_number(config, "rms_norm_eps"),
        max_position_embeddings=read_size(config, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
    )


def write_common(config: TransformerConfig) -> dict:
    """Returns the fields of a `config.json` that every family writes alike."""
    names = """
        model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim rms_norm_eps tie_word_embeddings max_position_embeddings
    """.split()
    return {name: getattr(config, name) for name in names} | write_rope(config.rope_theta, config.rope_scaling)


def read_size(config: Mapping, field: str, most: int = _MOST) -> int:
    """Reads a whole number above 0. Raises InputError where it is missing, null or something else: no size defaults."""
    value = _present(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is not a whole number above 0")
    if value > most:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is more than {most}")
    return value


def read_number(config: Mapping, field: str) -> int | float:
    """Reads a number above 0 that float32 holds; raises InputError otherwise."""
    value = _present(config, field)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is not a number above 0")
    if value > _MOST_NUMBER:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is more than {_MOST_NUMBER:g}")
    return value


def read_flag(config: Mapping, field: str, default: bool) -> bool:
    """Reads true or false; raises InputError for anything else."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is neither true nor false")
    return value


def refuse_unknown(config: Mapping, supported: Mapping[str, tuple]) -> None:
    """Raises InputError for a field whose value is not among the known ones; the first of them is what is meant."""
    for field, values in supported.items():
        if field in config and config[field] not in values:
            raise InputError(
                f"config.json: {field} = {reprlib.repr(config[field])} is not supported; only {values[0]!r} is"
            )


def refuse_what_no_family_has(config: Mapping) -> None:
    """Raises InputError for settings that change any model in transformers, and that no family here has."""
    refuse_quantised(config)
    if config.get("per_layer_config"):
        raise InputError("config.json: per_layer_config is not supported; all layers have the same sizes and settings")
    if config.get("is_causal", True) is not True:
        raise InputError(
            f"config.json: is_causal = {reprlib.repr(config['is_causal'])} is not supported; a token sees earlier ones"
        )


def refuse_quantised(config: Mapping) -> None:
    """Raises InputError for quantised weights, and says how to come by others."""
    for field in _QUANTISED:
        if not (entry := config.get(field)):
            continue
        method = entry.get("quant_method", entry.get("quant_algo")) if isinstance(entry, dict) else None
        if method is None and isinstance(entry, dict) and ("load_in_4bit" in entry or "load_in_8bit" in entry):
            method = "bitsandbytes"
        advice = _DEQUANTISE.get(method) if isinstance(method, str) else None
        raise InputError(
            f"config.json: {field}: the weights are quantised ({reprlib.repr(method or entry)}), and only weights in "
            f"16 or 32 bits are read. Load the model that they were made from{advice or ''}"
        )


def read_rope(config: Mapping) -> tuple[float, Llama3Scaling | None]:
    """Reads base and scaling of the rotary embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    transformers 5 writes the first spelling, earlier versions wrote the second. Where both are there they must agree,
    and so must all bases. `original_max_position_embeddings` counts as in transformers: the one beside the other
    sizes of the model before the one among the rope settings.
    """
    spelled = [config[field] for field in ("rope_parameters", "rope_scaling") if config.get(field)] or [{}]
    if wrong := [rope for rope in spelled if not isinstance(rope, dict)]:
        raise InputError(f"config.json: the rope settings are {reprlib.repr(wrong[0])}, not an object")
    thetas = [rope["rope_theta"] for rope in (*spelled, config) if rope.get("rope_theta") is not None]
    if not thetas:
        raise InputError("config.json: neither rope_parameters nor rope_theta gives the base of the rotary embedding")
    numbers = [float(read_number({"rope_theta": theta}, "rope_theta")) for theta in thetas]
    if len(set(numbers)) > 1:
        raise InputError(f"config.json: rope_theta is {numbers[0]} in one place and {numbers[-1]} in another: keep one")
    _refuse_partial(config)
    original = config.get("original_max_position_embeddings")
    spellings = [_read_scaling(rope, original) for rope in spelled]
    if spellings[0] != spellings[-1]:
        raise InputError("config.json: rope_parameters and rope_scaling do not say the same: keep one of them")
    return numbers[0], spellings[0]


def _read_scaling(rope: dict, original) -> Llama3Scaling | None:
    """Returns the scaling of one spelling; `original` is what stands outside of the rope settings."""
    kind, rope = _rope_type(rope), dict(rope)
    _refuse_partial(rope)
    for name in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
        rope.pop(name, None)
    scaling = None
    if kind == "llama3":
        inside = rope.get("original_max_position_embeddings")
        if original is not None:
            if inside not in (None, original):
                warn(
                    f"config.json: original_max_position_embeddings is {original} at the top level and {inside} in the "
                    "rope settings; the first one counts, as in transformers"
                )
            rope["original_max_position_embeddings"] = original
        fields = [field.name for field in dataclasses.fields(Llama3Scaling)]
        if missing := [field for field in fields if rope.get(field) is None]:
            raise InputError(f"config.json: rope type 'llama3' has no {', '.join(missing)}")
        scaling = Llama3Scaling(**{field: read_number({field: rope.pop(field)}, field) for field in fields})
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise InputError("config.json: low_freq_factor is not below high_freq_factor")
    if per_layer := [name for name, value in rope.items() if isinstance(value, dict)]:
        raise InputError(
            f"config.json: the rope settings hold others for {', '.join(map(str, per_layer))}; one for all layers is "
            "supported"
        )
    unused = [name for name, value in rope.items() if value is not None and value != _NEUTRAL.get(name)]
    if unused:
        warn(
            f"config.json: {', '.join(map(str, unused))} means nothing in rope settings of the type {kind!r}, and is "
            "ignored, as in transformers"
        )
    return scaling


def _rope_type(rope: Mapping) -> str:
    """Returns "default" or "llama3"; what does nothing under another name is "default" too."""
    named = {rope[name] for name in ("rope_type", "type") if name in rope and isinstance(rope[name], str)}
    if wrong := [rope[name] for name in ("rope_type", "type") if name in rope and not isinstance(rope[name], str)]:
        raise InputError(f"config.json: rope type {reprlib.repr(wrong[0])} is not a name")
    types = named or {"default"}
    if len(types) > 1:
        raise InputError(
            f"config.json: rope_type and type do not say the same ({', '.join(map(repr, sorted(types)))}): keep one"
        )
    (kind,) = types
    if kind in _STRETCHED and rope.get("factor") in (1, 1.0) and type(rope["factor"]) is not bool:
        changed = [name for name in _ALSO_STRETCH if rope.get(name) not in (None, _NEUTRAL.get(name))]
        if not changed:
            return "default"
    if kind not in ("default", "llama3"):
        raise InputError(f"config.json: rope type {kind!r} is not supported; 'default' and 'llama3' are")
    return kind


def _refuse_partial(settings: Mapping) -> None:
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError("config.json: partial_rotary_factor is not supported; the whole head is rotated")


def _present(config: Mapping, field: str):
    if config.get(field) is None:
        raise InputError(f"config.json: the field {field!r} is missing")
    return config[field]


def write_rope(theta: float, scaling: Llama3Scaling | None) -> dict:
    """Returns both spellings of the rope settings, for transformers 4 and 5."""
    if scaling is None:
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    fields = {"rope_type": "llama3", **vars(scaling)}
    return {"rope_theta": theta, "rope_scaling": fields, "rope_parameters": {**fields, "rope_theta": theta}}
