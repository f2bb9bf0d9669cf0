"""This process's rows of a batch, and how the rows of all hosts become one batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
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
        self._sharding = sharding
        parts = sharding.addressable_devices_indices_map((batch_size,)).values()
        self.rows = sorted({row for (part,) in parts for row in range(*part.indices(batch_size))})

    def to_global(self, local: Tree) -> Tree:
        """Puts arrays `[len(self.rows), ...]` onto the devices: a tree of global arrays `[batch_size, ...]`."""
        with jax.transfer_guard_host_to_device("allow"):  # this transfer is meant
            return jax.make_array_from_process_local_data(self._sharding, local)


def packed_batches(
    planned: Sequence[list[int]],
    tree: Callable[[int], TokenTrees],
    max_seq_len: int,
    batch_size: int,
    mesh: Mesh | None,
) -> Iterator[tuple[Sequence[list[int]], TokenTrees]]:
    """Yields planned rows, each the numbers of its trees, as batches `[batch_size, max_seq_len]` on the mesh's devices,
    with the rows of each. Of the last batch rows may be empty. Of several processes each builds the trees of its
    rows."""
    local_batch = ProcessLocalBatch(rows_sharding(mesh), batch_size) if mesh else None
    for start in range(0, len(planned), batch_size):
        members = planned[start : start + batch_size]
        local_packs = [
            members[row] if row < len(members) else []
            for row in (local_batch.rows if local_batch else range(batch_size))
        ]
        batch = stack([pack([tree(index) for index in row], max_seq_len) for row in local_packs])
        yield members, local_batch.to_global(batch) if local_batch else batch
