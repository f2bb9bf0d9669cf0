"""What the families' readers of `config.json` have in common: refusals by name, and the settings of rope."""

from collections.abc import Mapping

from jax_backtrack.errors import InputError
from jax_backtrack.models.rope import Llama3Scaling


def require(config: Mapping, field: str):
    """The field's value. Raises InputError where it is missing or null: sizes never default silently."""
    if config.get(field) is None:
        raise InputError(f"config.json: the field {field!r} is missing")
    return config[field]


def refuse_unknown(config: Mapping, known: Mapping[str, tuple]) -> None:
    """Raises InputError for a field whose value is not among the known ones; the first of them is what is meant."""
    for field, values in known.items():
        if field in config and config[field] not in values:
            raise InputError(f"config.json: {field} = {config[field]!r} is not supported; only {values[0]!r} is")


def read_rope(config: Mapping) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling of the rotary embedding, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

    transformers 5 writes the first spelling, earlier versions wrote the second.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or config.get("rope_theta")
    if theta is None:
        raise InputError("config.json: neither rope_parameters nor rope_theta gives the base of the rotary embedding")
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if rope_type not in ("default", "llama3"):
        raise InputError(f"config.json: rope type {rope_type!r} is not supported; 'default' and 'llama3' are")
    scaling = None
    if rope_type == "llama3":
        fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if missing := [field for field in fields if rope.get(field) is None]:
            raise InputError(f"config.json: rope type 'llama3' has no {', '.join(missing)}")
        scaling = Llama3Scaling(**{field: rope.pop(field) for field in fields})
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        raise InputError("config.json: partial_rotary_factor is not supported; the whole head is rotated")
    if rope_type == "llama3" and rope:
        raise InputError(f"config.json: the rope settings {', '.join(sorted(rope))} are not supported")
    return float(theta), scaling


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
