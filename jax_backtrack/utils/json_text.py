"""Values as JSON that every reader takes, and back as what they were."""

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing

from jax_backtrack.utils.unicode import is_unicode

_NAMES = {str: "text", bool: "true or false", int: "whole number", float: "number", dict: "object", list: "list"}


def to_json(value, **layout) -> str:
    """Returns a value, of which dataclasses may be part, as JSON; `layout` is that of `json.dumps`.

    NaN and the infinities, which JSON does not have, become null.
    """
    return json.dumps(_plain(value), allow_nan=False, **{"ensure_ascii": False, **layout})


def from_json(kind, value):
    """Returns a value that JSON holds as one of a type: text, flag, whole number from 0 on, number (null is NaN),
    optional type, tuple or dict of a type, or a dataclass of these; what the dataclass has no field for is left out.

    Raises TypeError or ValueError for what is not of the type.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else from_json(inner[0], value)
    if origin is tuple:
        return tuple(from_json(inner[0], entry) for entry in _is_a(list, value))
    if origin is dict:
        return {from_json(inner[0], key): from_json(inner[1], entry) for key, entry in _is_a(dict, value).items()}
    if dataclasses.is_dataclass(kind):
        kinds, fields = _hints(kind), _is_a(dict, value).items()
        return kind(**{name: from_json(kinds[name], entry) for name, entry in fields if name in kinds})
    if kind is float and value is None:
        return math.nan
    if kind is float and not math.isfinite(value := float(_is_a(kind, value))):
        raise ValueError(f"{value} is not finite")
    if kind is str and not is_unicode(_is_a(kind, value)):
        raise ValueError(f"{reprlib.repr(value)} is not valid Unicode")
    if kind is int and not 0 <= _is_a(kind, value) < 2**63:
        raise ValueError(f"{reprlib.repr(value)} is too large, or below 0")
    return _is_a(kind, value)


_hints = functools.cache(typing.get_type_hints)


def _is_a(kind: type, value):
    """Returns the value; TypeError where it is not of this kind. To Python, True and False are whole numbers."""
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{reprlib.repr(value)} is no {_NAMES[kind]}")
    return value


def _plain(value):
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
