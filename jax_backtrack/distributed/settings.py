"""Settings of the mesh of devices."""

from jax_backtrack.utils.settings import field, section


@section("mesh")
class MeshSettings:
    """Number of devices along each axis of the mesh."""

    data: int = field(
        -1,
        "Devices along which rows lie; it alone crosses from slice to slice. -1: what the others leave.",
        unit="devices",
        least=-1,
    )
    fsdp: int = field(
        1,
        "Devices along which rows and parameters lie. `data` and `fsdp` both -1: `data` is the number of slices.",
        unit="devices",
        least=-1,
    )
    tensor: int = field(1, "Devices along which heads and feed-forward features lie.", unit="devices", least=-1)
