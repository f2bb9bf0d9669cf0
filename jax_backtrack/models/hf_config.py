"""What the families' readers of `config.json` have in common: numbers, refusals by name, and rope."""

import dataclasses
import reprlib
from collections.abc import Mapping

from jax_backtrack.errors import InputError
from jax_backtrack.models.rope import Llama3Scaling
from jax_backtrack.models.transformer import TransformerConfig

_MOST_LAYERS = 10_000  # a file that claims more is wrong, and their names alone would fill the memory
_MOST = 2**31 - 1  # of every other size: indices are int32
_MOST_NUMBER = 1e38  # of other numbers, which float32 has to hold


def read_common(config: Mapping) -> dict:
    """The fields of `TransformerConfig` that every family reads alike."""
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
    """The fields of a `config.json` that every family writes alike."""
    names = """
        model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        head_dim rms_norm_eps tie_word_embeddings max_position_embeddings
    """.split()
    return {name: getattr(config, name) for name in names} | write_rope(config.rope_theta, config.rope_scaling)


def read_size(config: Mapping, field: str, most: int = _MOST) -> int:
    """A whole number above 0. Raises InputError where it is missing, null or something else: sizes never default."""
    value = _present(config, field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is not a whole number above 0")
    if value > most:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is more than {most}")
    return value


def read_number(config: Mapping, field: str) -> int | float:
    """A number above 0 that float32 holds; raises InputError otherwise."""
    value = _present(config, field)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is not a number above 0")
    if value > _MOST_NUMBER:
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is more than {_MOST_NUMBER:g}")
    return value


def read_flag(config: Mapping, field: str, default: bool) -> bool:
    """True or false; raises InputError for anything else."""
    value = config.get(field, default)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {field} = {reprlib.repr(value)} is neither true nor false")
    return value


def refuse_unknown(config: Mapping, known: Mapping[str, tuple]) -> None:
    """Raises InputError for a field whose value is not among the known ones; the first of them is what is meant."""
    for field, values in known.items():
        if field in config and config[field] not in values:
            raise InputError(
                f"config.json: {field} = {reprlib.repr(config[field])} is not supported; only {values[0]!r} is"
            )


def read_rope(config: Mapping) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling of the rotary embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    transformers 5 writes the first spelling, earlier versions wrote the second. Where both are there they must agree.
    """
    given = [config[field] for field in ("rope_parameters", "rope_scaling") if config.get(field) is not None] or [{}]
    if wrong := [each for each in given if not isinstance(each, dict)]:
        raise InputError(f"config.json: the rope settings are {reprlib.repr(wrong[0])}, not an object")
    theta = next((each["rope_theta"] for each in (*given, config) if "rope_theta" in each), None)
    spellings = [_read_spelling(each, theta) for each in given]
    if spellings[0] != spellings[-1]:
        raise InputError("config.json: rope_parameters and rope_scaling do not say the same: keep one of them")
    return spellings[0]


def _read_spelling(given: dict, theta) -> tuple[float, Llama3Scaling | None]:
    rope = dict(given)
    theta = rope.pop("rope_theta", theta)
    if theta is None:
        raise InputError("config.json: neither rope_parameters nor rope_theta gives the base of the rotary embedding")
    theta = float(read_number({"rope_theta": theta}, "rope_theta"))
    types = {rope.pop(name) for name in ("rope_type", "type") if isinstance(rope.get(name), str)} or {"default"}
    if unknown := sorted(types - {"default", "llama3"}):
        raise InputError(f"config.json: rope type {unknown[0]!r} is not supported; 'default' and 'llama3' are")
    if len(types) > 1:
        raise InputError("config.json: rope_type and type do not say the same")
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config.json: partial_rotary_factor is not supported; the whole head is rotated")
    scaling = None
    if types == {"llama3"}:
        fields = [field.name for field in dataclasses.fields(Llama3Scaling)]
        if missing := [field for field in fields if rope.get(field) is None]:
            raise InputError(f"config.json: rope type 'llama3' has no {', '.join(missing)}")
        scaling = Llama3Scaling(**{field: read_number({field: rope.pop(field)}, field) for field in fields})
        if scaling.low_freq_factor >= scaling.high_freq_factor:
            raise InputError("config.json: low_freq_factor is not below high_freq_factor")
    if rope:
        raise InputError(f"config.json: the rope settings {', '.join(map(str, rope))} are not supported")
    return theta, scaling


def _present(config: Mapping, field: str):
    if config.get(field) is None:
        raise InputError(f"config.json: the field {field!r} is missing")
    return config[field]


def write_rope(theta: float, scaling: Llama3Scaling | None) -> dict:
    """Both spellings of the rope settings, for transformers 4 and 5."""
    if scaling is None:
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }
    fields = {"rope_type": "llama3", **vars(scaling)}
    return {"rope_theta": theta, "rope_scaling": fields, "rope_parameters": {**fields, "rope_theta": theta}}
