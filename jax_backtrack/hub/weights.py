"""Moves weights between Hugging Face names and the model's parameters, through one two-way table per family."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jax_backtrack.distributed.mesh import on_host
from jax_backtrack.errors import InputError
from jax_backtrack.hub.missing import missing_tensors, some
from jax_backtrack.hub.safetensors_folder import INDEX_FILE
from jax_backtrack.models.assign import assign
from jax_backtrack.models.families import weight_names
from jax_backtrack.models.transformer import Transformer

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PIECE = 2**20  # elements: what fits into a cache


class WeightSource(Protocol):
    """Where weights come from: tensors by their Hugging Face names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor."""

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of one tensor, in a floating dtype of the file's."""


def fill(
    model: Transformer, source: WeightSource, shardings: nnx.State, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Gives an abstract model (`nnx.eval_shape`) its weights from `source`, in each parameter's own dtype and place.

    Tensors are read one at a time, of each only what this process's devices need, and go to the devices as they stand
    in the file; transposing, casting and stacking happen there. So a host holds one tensor beside the parameters.
    `progress` is called with the number of elements done since its last call.

    Raises InputError naming every tensor that is missing, left over or of another shape, before anything is read; and
    the first one with NaN or infinite values.
    """
    params = _params(model)
    places = {".".join(map(str, path)): place for path, place in nnx.to_flat_state(shardings)}
    _check_names_and_shapes(model, source)
    for path, (_, input_axes) in _table(model).items():
        names, place, param = _hf_names(model, path), places[path], params[path]
        if not _is_stacked(path):
            assign(param, _read(source, names[0], place, param.dtype).astype(param.dtype))
            progress(param.size)
            continue
        array, tensor_place = jnp.zeros(param.shape, param.dtype, device=place), _hf_place(place, input_axes)
        for layer, name in enumerate(names):
            tensor = _read(source, name, tensor_place, param.dtype)
            array = _insert(array, tensor, layer, transposed=bool(input_axes), place=place)
            array.block_until_ready()  # a tensor in flight would be one more held
            progress(tensor.size)
        assign(param, array)


def save(model: Transformer, folder: Path, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes the model's weights under their Hugging Face names, in their dtypes: in one file, or in several of at most
    `max_shard_bytes` with an index. A host holds one file's tensors at a time. On several hosts all must call this;
    the first one writes.
    """
    parts, params, table = {}, _params(model), _table(model)
    for path, (_, input_axes) in table.items():
        for layer, name in enumerate(_hf_names(model, path)):
            shape = _layer_shape(path, params[path])
            parts[name] = path, layer, jax.ShapeDtypeStruct(_hf_shape(shape, input_axes), params[path].dtype)
    split = huggingface_hub.split_state_dict_into_shards_factory(
        parts,
        get_storage_size=lambda part: part[2].size * part[2].dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            path, layer, form = parts[name]
            value = params[path][...][layer] if _is_stacked(path) else params[path][...]
            value = on_host(value)
            transposed = table[path][1]
            tensors[name] = np.ascontiguousarray(value.reshape(form.shape[::-1]).T if transposed else value)
        if jax.process_index() == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded and jax.process_index() == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("transposed", "place"))
def _insert(array: jax.Array, tensor: jax.Array, layer: jax.Array, *, transposed: bool, place: NamedSharding):
    """Returns a stacked parameter, which lies at `place`, with one layer's tensor in it.

    Two-byte floats move as integers: XLA on CPU would widen the whole stack and narrow it again for every layer.
    """
    value = _as_bits((tensor.T if transposed else tensor).astype(array.dtype)).reshape(array.shape[1:])
    bits = jax.lax.dynamic_update_index_in_dim(_as_bits(array), value, layer, 0)
    return jax.lax.with_sharding_constraint(jax.lax.bitcast_convert_type(bits, array.dtype), place)


def _as_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _read(source: WeightSource, name: str, place: NamedSharding, dtype) -> jax.Array:
    """Returns one tensor of the source in the dtype of the file, each device's part of it read once.

    Raises InputError where a value is NaN, or infinite in the parameter's dtype.
    """
    shape = source.shapes()[name]

    @functools.cache
    def read(*bounds):
        part = source.read(name, tuple(slice(*pair) for pair in bounds))
        if not np.isfinite(_largest_magnitude(part).astype(dtype)):
            raise InputError(f"{name} holds NaN, or values that are infinite in {np.dtype(dtype).name}")
        return part

    def part(index: tuple[slice, ...]) -> np.ndarray:
        return read(*(extent.indices(size)[:2] for extent, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, place, part)


def _largest_magnitude(x: np.ndarray) -> np.ndarray:
    """Returns the largest absolute value as an array without axes; NaN where there is one.

    Without its sign, a float is larger than another where its bits are the larger integer; infinity and NaN come last.
    """
    bits = x.reshape(-1).view(f"u{x.itemsize}")
    unsigned = np.iinfo(bits.dtype).max >> 1
    pieces = (bits[start : start + _PIECE] & unsigned for start in range(0, bits.size, _PIECE))
    return np.asarray(max(piece.max() for piece in pieces), bits.dtype).view(x.dtype)


def _check_names_and_shapes(model: Transformer, source: WeightSource) -> None:
    params, present, expected = _params(model), source.shapes(), {}
    if (layers := model.config.num_hidden_layers) > len(present):
        raise InputError(f"config.json says num_hidden_layers {layers}; the weights have {len(present)} tensors in all")
    for path, (_, input_axes) in _table(model).items():
        expected |= dict.fromkeys(_hf_names(model, path), _hf_shape(_layer_shape(path, params[path]), input_axes))
    ours = set(present)
    head_beside_tied = model.config.tie_word_embeddings and _HEAD in ours
    if head_beside_tied:
        ours.discard(_HEAD)
    missing, extra = sorted(expected.keys() - ours), sorted(ours - expected.keys())
    if missing:
        raise InputError(missing_tensors(missing, extra))
    if extra:
        raise InputError(f"{len(extra)} tensors of the weights have no place in the model: {some(extra)}")
    for name, shape in expected.items():
        if present[name] != shape:
            raise InputError(f"{name} has shape {present[name]}; the configuration asks for {shape}")
    if head_beside_tied and not _equal_when_rounded(source, _HEAD, _EMBEDDING):
        raise InputError(
            f"config.json ties the embeddings, but {_HEAD} and {_EMBEDDING} differ: set tie_word_embeddings to false "
            f"to keep both, or take {_HEAD} out of the weights"
        )


def _equal_when_rounded(source: WeightSource, left_name: str, right_name: str) -> bool:
    """Returns whether two tensors are the same numbers, each rounded to its own dtype; compares some rows at a time."""
    shape = source.shapes()[left_name]
    if source.shapes()[right_name] != shape:
        return False
    rows = max(1, _PIECE // math.prod(shape[1:]))
    pieces = ((slice(row, min(row + rows, shape[0])), slice(0, shape[1])) for row in range(0, shape[0], rows))
    return all(_close(source.read(left_name, piece), source.read(right_name, piece)) for piece in pieces)


def _close(left: np.ndarray, right: np.ndarray) -> bool:
    if left.dtype == right.dtype:
        return np.array_equal(left, right)
    apart = np.abs(left.astype(np.float64) - right.astype(np.float64))
    return bool((apart <= _rounding(left) + _rounding(right)).all())


def _rounding(x: np.ndarray) -> np.ndarray:
    """Returns the most by which numbers may have been rounded to become these."""
    info = jnp.finfo(x.dtype)
    magnitude = np.abs(x.astype(np.float64))
    return np.maximum(magnitude * float(info.eps), float(info.smallest_subnormal)) / 2


def _table(model: Transformer) -> dict[str, tuple[str, int]]:
    """Returns the family's rows for the parameters that this model has; a tied model has no head."""
    names = weight_names(model.config)
    return {path: names[path] for path in _params(model)}


def _params(model: Transformer) -> dict[str, nnx.Param]:
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _hf_names(model: Transformer, path: str) -> list[str]:
    """Returns one name per layer where the parameter is stacked."""
    name = weight_names(model.config)[path][0]
    layers = range(model.config.num_hidden_layers if "{layer}" in name else 1)
    return [name.format(layer=layer) for layer in layers]


def _hf_shape(shape: tuple[int, ...], input_axes: int) -> tuple[int, ...]:
    if not input_axes:
        return shape
    return math.prod(shape[input_axes:]), math.prod(shape[:input_axes])


def _hf_place(place: NamedSharding, input_axes: int) -> NamedSharding:
    """Returns where one layer's tensor lies in the file's layout: its devices hold what they need of the parameter.

    Of axes that are one axis in the file only the first is ever spread over the mesh: heads, not what is in them.
    """
    _, *axes = place.spec
    return NamedSharding(place.mesh, PartitionSpec(*((axes[input_axes], axes[0]) if input_axes else axes)))


def _is_stacked(path: str) -> bool:
    return path.startswith("blocks.")


def _layer_shape(path: str, param: nnx.Param) -> tuple[int, ...]:
    """Returns the shape of one layer's part of a stacked parameter, or of a parameter that is not stacked."""
    return param.shape[1:] if _is_stacked(path) else param.shape
