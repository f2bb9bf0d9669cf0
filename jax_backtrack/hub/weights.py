"""Moves weights between Hugging Face names and the model's parameters, through one two-way table per family."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_backtrack.errors import InputError
from jax_backtrack.models.llama import WEIGHT_NAMES
from jax_backtrack.models.transformer import Transformer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class SafetensorsFolder:
    """The weights of a Hugging Face folder, whether in one file or in shards with an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        if (index := folder / INDEX_FILE).exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        elif (folder / SINGLE_FILE).exists():
            files = {SINGLE_FILE}
        else:
            found = sorted(path.name for path in folder.iterdir())
            raise InputError(
                f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}, only {', '.join(found) or 'nothing'}. "
                "Pickled weights (.bin, .pt) are never loaded: convert them to safetensors first"
            )
        self._files = {}
        for file in sorted(files):
            try:
                opened = safe_open(folder / file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{folder / file} cannot be read as safetensors: {error}") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def tensor_names(self) -> Iterator[str]:
        """Names of the tensors in all files."""
        return iter(self._files)

    def tensor(self, hf_name: str) -> np.ndarray:
        """One tensor in the dtype of its file."""
        return self._files[hf_name].get_tensor(hf_name)


def fill(model: Transformer, source, shardings: nnx.State) -> None:
    """Gives an abstract model (`nnx.eval_shape`) its weights from `source`, in each parameter's own dtype and place.

    `source` has `tensor_names()` and `tensor(name)`. Raises InputError naming every tensor that is missing, left
    over or of another shape.
    """
    params = _params(model)
    places = {".".join(map(str, path)): place for path, place in nnx.to_flat_state(shardings)}
    layers = model.config.num_hidden_layers
    wanted = {name for path in params for name in _hf_names(path, layers)}
    present = {name for name in source.tensor_names() if not name.endswith("rotary_emb.inv_freq")}  # computed here
    if model.config.tie_word_embeddings:
        present.discard("lm_head.weight")
    if missing := sorted(wanted - present):
        raise InputError(f"{len(missing)} tensors are missing from the weights: {_some(missing)}")
    if extra := sorted(present - wanted):
        raise InputError(f"{len(extra)} tensors of the weights have no place in the model: {_some(extra)}")
    for path, param in params.items():
        value = np.empty(param.shape, param.dtype)
        for name, part in _parts(path, value, layers):
            tensor = source.tensor(name)
            input_axes = WEIGHT_NAMES[path][1]
            if tensor.shape != (shape := _hf_shape(part.shape, input_axes)):
                raise InputError(f"{name} has shape {tensor.shape}; the configuration asks for {shape}")
            part[...] = (tensor.T if input_axes else tensor).reshape(part.shape)
        param.set_value(jax.device_put(value, places[path]))


def save(model: Transformer, folder: Path) -> None:
    """Writes the model's weights to `folder/model.safetensors` under their Hugging Face names, in their dtypes."""
    tensors = {}
    for path, param in _params(model).items():
        input_axes = WEIGHT_NAMES[path][1]
        for name, part in _parts(path, np.asarray(param[...]), model.config.num_hidden_layers):
            shape = _hf_shape(part.shape, input_axes)
            tensor = part.reshape(shape[::-1]).T if input_axes else part
            tensors[name] = np.ascontiguousarray(tensor)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def _params(model: Transformer) -> dict[str, nnx.Param]:
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _hf_names(path: str, layers: int) -> list[str]:
    name = WEIGHT_NAMES[path][0]
    return [name.format(layer=layer) for layer in range(layers)] if "{layer}" in name else [name]


def _parts(path: str, value: np.ndarray, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Views of a parameter with the Hugging Face name of each: one per layer where it is stacked."""
    names = _hf_names(path, layers)
    return zip(names, value if "{layer}" in WEIGHT_NAMES[path][0] else [value], strict=True)


def _hf_shape(shape: tuple[int, ...], input_axes: int) -> tuple[int, ...]:
    if not input_axes:
        return shape
    return math.prod(shape[input_axes:]), math.prod(shape[:input_axes])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
