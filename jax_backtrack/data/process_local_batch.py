"""Of the rows of a batch, those that this process's devices hold, and how all hosts' rows become one batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from jax_backtrack.backtracking.trees import TokenTrees, pack, stack
from jax_backtrack.distributed.mesh import rows_sharding

Tree = TypeVar("Tree")


class ProcessLocalBatch:
    """This process's part of batches of `batch_size` rows under a sharding of their first axis.

    rows: numbers, within the batch, of the rows that the process's devices hold, in order. On one process these are
    all; where a mesh's `tensor` axis spans hosts, several processes hold the same.
    """

    def __init__(self, sharding: Sharding, batch_size: int):
        self._sharding, self._batch_size = sharding, batch_size
        parts = {
            device: range(*rows.indices(batch_size))
            for device, (rows,) in sharding.addressable_devices_indices_map((batch_size,)).items()
        }
        self.rows = sorted({row for part in parts.values() for row in part})
        # A device's rows follow one another in the batch, and so they do among the process's.
        first = {device: self.rows.index(part.start) for device, part in parts.items()}
        self._parts = {device: slice(first[device], first[device] + len(part)) for device, part in parts.items()}

    def to_global(self, local: Tree) -> Tree:
        """Puts arrays `[len(self.rows), ...]` onto the devices: a tree of global arrays `[batch_size, ...]`.

        Said to be a transfer (`jax.device_put`), so that it passes where `jax.transfer_guard` refuses the others.
        """
        return jax.tree.map(self._put, local)

    def _put(self, array: np.ndarray) -> jax.Array:
        pieces = jax.device_put([array[part] for part in self._parts.values()], list(self._parts))
        shape = self._batch_size, *array.shape[1:]
        return jax.make_array_from_single_device_arrays(shape, self._sharding, pieces)


def packed_batches(
    planned: Sequence[list[int]],
    tree: Callable[[int], TokenTrees],
    max_seq_len: int,
    batch_size: int,
    mesh: Mesh | None,
) -> Iterator[tuple[Sequence[list[int]], TokenTrees]]:
    """Planned rows, each the numbers of its trees, as batches `[batch_size, max_seq_len]` on the mesh's devices, with
    the rows of each. Of the last batch rows may be empty. Of several processes each builds the trees of its rows."""
    local_batch = ProcessLocalBatch(rows_sharding(mesh), batch_size) if mesh else None
    for start in range(0, len(planned), batch_size):
        members = planned[start : start + batch_size]
        held = [
            members[row] if row < len(members) else []
            for row in (local_batch.rows if local_batch else range(batch_size))
        ]
        batch = stack([pack([tree(index) for index in row], max_seq_len) for row in held])
        yield members, local_batch.to_global(batch) if local_batch else batch
