"""What is published of TPU chips.

Source: the specification tables of https://docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p-training and /v6e (2026).
"""

import dataclasses

from jax_backtrack.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    hbm_bytes:      memory
    flops:          peak of bfloat16 matrix products, per second
    link_bytes:     per second and direction over all links to other chips, half of the bidirectional figure; None where
                    the table has none
    """

    hbm_bytes: int
    flops: float
    link_bytes: float | None


_GIB = 2**30
CHIPS = {
    "v4": Chip(32 * _GIB, 275e12, None),
    "v5e": Chip(16 * _GIB, 197e12, 200e9),
    "v5p": Chip(95 * _GIB, 459e12, 600e9),
    "v6e": Chip(32 * _GIB, 918e12, 400e9),
}


def chip(topology: str) -> Chip:
    """Returns the chip that a topology's name begins with. Raises InputError for one that is not in the table."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise InputError(f"topology {topology!r}: no chip {name!r} here; there are {', '.join(CHIPS)}, as in v5e:4x4")
    return CHIPS[name]
