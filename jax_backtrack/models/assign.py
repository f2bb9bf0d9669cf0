"""A parameter's new value, by what the release of Flax has for it."""

from typing import Any

from flax import nnx


def assign(param: nnx.Variable, value: Any) -> None:
    """Gives a parameter another value; flax before 0.12 has no `set_value`, and later releases deprecate `value`."""
    if hasattr(nnx.Variable, "set_value"):
        param.set_value(value)
    else:
        param.value = value
