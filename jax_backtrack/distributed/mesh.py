"""Where arrays live: the letters in a name are its array's axes, and one table sends axes to the mesh.

Parameters, and what is kept of each (gradients, moments), are spread over `fsdp` and `tensor`, and are the same along
`data`. Rows of a batch, and what is computed of them, are spread over `data` and `fsdp`. So each layer's weights are
gathered along `fsdp` when the layer is computed, and a gradient is summed over the rows where it is put back.

The vocabulary is the exception. Gathered, its table would be the largest array of the step, and so would its gradient.
So its rows are spread over `fsdp` and `tensor`, and in the projection to logits the rows of a batch come together
instead, a chunk of scored tokens at a time: each device scores them against its own part of the vocabulary. To look
tokens up, each device takes some features of all rows of the table.

Decoding feeds few tokens at a time, so there weights stay where they are kept and what is computed travels: features
lie along `fsdp` as the weights' do, and each device multiplies its part of them. Only attention has its rows along
`fsdp` too, as the cache has.
"""

import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_backtrack.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

_ROWS = ("data", "fsdp")
# Letter of an axis -> mesh axes, by what an array is there for. What is not listed is whole on every device.
LOGICAL_AXIS_RULES = {
    "kept": {"M": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"},
    "computed": {"B": _ROWS, "N": "tensor", "K": "tensor", "F": "tensor"},
    "decoded": {"B": "data", "M": "fsdp", "N": "tensor", "K": "tensor", "F": "tensor"},
    "looked up": {"B": "data", "M": "fsdp", "V": "tensor"},
    "projected": {"B": "data", "V": ("fsdp", "tensor")},
}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of `data x fsdp x tensor` devices, by default of all; an axis of -1 takes what the others leave.

    Devices of several slices are laid out so that only `data` crosses from slice to slice, where links are slow; with
    `data` and `fsdp` both -1, `data` is the number of slices. Raises InputError where the sizes do not multiply to the
    number of devices, or `data` does not divide over the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = f"mesh.data, fsdp, tensor = {data}, {fsdp}, {tensor}"
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data == fsdp == -1:
        sizes["data"] = slices
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(
            f"{given}: sizes are at least 1; one of them may be -1, for what the others leave, or data and fsdp both"
        )
    for name in open_axes:
        sizes[name] = max(1, len(devices) // -math.prod(sizes.values()))
    if (count := math.prod(sizes.values())) != len(devices):
        raise InputError(f"{given} needs {count} devices, {len(devices)} are here")
    if sizes["data"] % slices:
        raise InputError(
            f"mesh.data = {sizes['data']} does not divide over {slices} slices; only data may cross slices"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
    return Mesh(grid, MESH_AXES, axis_types=types)


def platform(mesh: Mesh | None) -> str:
    """Returns the kind of devices that are computed on, "cpu", "gpu" or "tpu"; without a mesh of JAX's default one."""
    return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform


def logical_to_spec(axes: str, purpose: str = "kept") -> PartitionSpec:
    """Returns the places of an array whose axes are named by letters, as in `query_MxNxD` -> "MxNxD".

    `purpose` is a key of the table: "kept", "computed", "decoded", "looked up" or "projected".
    """
    places = [LOGICAL_AXIS_RULES[purpose].get(letter) for letter in axes.split("x")]
    mesh_axes = [name for place in places for name in _names(place)]
    if len(mesh_axes) != len(set(mesh_axes)):
        raise InputError(f"two axes of {axes} would lie on one mesh axis")
    return PartitionSpec(*places)


def shard(x: jax.Array, axes: str, mesh: Mesh | None, purpose: str = "computed") -> jax.Array:
    """Holds an array of a jitted function where the table says; does nothing without a mesh."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, logical_to_spec(axes, purpose)))


def param_shardings(model: nnx.Module, mesh: Mesh, kind: type = nnx.Param) -> nnx.State:
    """Returns a sharding for every parameter of the model, read off its name; layers are stacked along a first axis.

    Raises InputError, with the numbers, for an axis that does not divide over its part of the mesh.
    """

    def one(path, param):
        name = str(path[-1])
        axes = name.rsplit("_", 1)[1]
        axes = axes if len(axes.split("x")) == param.ndim else f"Lx{axes}"
        is_table = "V" in axes
        for purpose in ("projected", "looked up") if is_table else ("kept",):
            for letter, size in zip(axes.split("x"), param.shape, strict=True):
                _check_divides(name, letter, size, mesh, purpose)
        return NamedSharding(mesh, logical_to_spec(axes, "projected" if is_table else "kept"))

    return nnx.map_state(one, nnx.state(model, kind))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, and what the model computes of them, lie along `data` and `fsdp`."""
    return NamedSharding(mesh, logical_to_spec("B", "computed"))


def row_parts(mesh: Mesh | None) -> int:
    """Returns how many parts the rows of a batch are spread over; 1 without a mesh."""
    return 1 if mesh is None else _parts(mesh, _ROWS)


def on_host(array: jax.Array) -> np.ndarray:
    """Returns the whole array, on every process; all must call this where it is spread over several."""
    return np.asarray(array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True))


def check_rows(rows: int, mesh: Mesh, field: str) -> None:
    """Raises InputError unless this many rows divide over the mesh."""
    parts = row_parts(mesh)
    if rows % parts:
        raise InputError(f"{field} = {rows} does not divide by mesh.data x mesh.fsdp = {parts}")


def _check_divides(name: str, letter: str, size: int, mesh: Mesh, purpose: str) -> None:
    names = _names(LOGICAL_AXIS_RULES[purpose].get(letter))
    if names and size % (parts := _parts(mesh, names)):
        over = " x ".join(f"mesh.{axis}" for axis in names)
        raise InputError(f"{name}: axis {letter} of {size} does not divide by {over} = {parts}")


def _names(place: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (place,) if isinstance(place, str) else place or ()


def _parts(mesh: Mesh, names: Iterable[str]) -> int:
    return math.prod(mesh.shape[name] for name in names)
