"""Where arrays live: the letters in a parameter's name are its axes, and one table sends axes to the mesh."""

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_backtrack.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")

# Axis letter -> mesh axis. What is not listed is on every device.
_PLACES = {"B": ("data", "fsdp"), "M": "fsdp", "V": "tensor", "N": "tensor", "K": "tensor", "F": "tensor"}


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of `data x fsdp x tensor` devices; `data = -1` takes all that the other axes leave.

    Raises InputError where that is not the number of devices: none is left idle without a word.
    """
    present = jax.device_count()
    if min(fsdp, tensor) < 1 or (data < 1 and data != -1):
        raise InputError(f"mesh.data, fsdp, tensor = {data}, {fsdp}, {tensor}: sizes are at least 1; data may be -1")
    if data == -1:
        data = max(1, present // (fsdp * tensor))
    wanted = data * fsdp * tensor
    if wanted != present:
        raise InputError(
            f"mesh.data x fsdp x tensor = {data} x {fsdp} x {tensor} needs {wanted} devices, {present} are here"
        )
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition(axes: str) -> PartitionSpec:
    """The places of an array whose axes are named by letters, as in `query_MxNxD` -> "MxNxD"."""
    places = [_PLACES.get(letter) for letter in axes.split("x")]
    used = [name for place in places for name in ((place,) if isinstance(place, str) else place or ())]
    if len(used) != len(set(used)):
        raise InputError(f"two axes of {axes} would lie on one mesh axis")
    return PartitionSpec(*places)


def param_shardings(model: nnx.Module, mesh: Mesh) -> nnx.State:
    """A sharding for every parameter of the model, read off its name; layers are stacked along a first axis."""

    def one(path, param):
        name = str(path[-1])
        stacked = "Lx" if "blocks" in map(str, path) else ""
        axes = stacked + name.rsplit("_", 1)[1]
        for letter, size in zip(axes.split("x"), param.shape, strict=True):
            place = _PLACES.get(letter)
            if place and size % mesh.shape[place]:
                raise InputError(
                    f"{name}: axis {letter} of {size} does not divide by mesh.{place} = {mesh.shape[place]}"
                )
        return NamedSharding(mesh, partition(axes))

    return nnx.map_state(one, nnx.state(model, nnx.Param))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, and what the model computes of them, lie along `data` and `fsdp`."""
    return NamedSharding(mesh, partition("B"))


def check_rows(rows: int, mesh: Mesh, field: str) -> None:
    """Raises InputError unless this many rows divide over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise InputError(f"{field} = {rows} does not divide by mesh.data x mesh.fsdp = {parts}")
