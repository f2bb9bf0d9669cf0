"""Reads the JSON files that lie in folders of models."""

import json
from pathlib import Path

from jax_backtrack.errors import InputError


def read_object(file: Path) -> dict:
    """Returns the object that a JSON file holds; InputError where it holds none, or cannot be read."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file} holds no object but {value!s:.40}")
    return value
