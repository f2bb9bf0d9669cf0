"""How a model attends within token trees: densely, in chunks, by blocks, or by the TPU kernel."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from jax_backtrack.backtracking.trees import attention_rule
from jax_backtrack.distributed.mesh import partition, platform
from jax_backtrack.errors import InputError
from jax_backtrack.models.attention.blockwise import Seen, attend_by_blocks, seen_blocks
from jax_backtrack.models.attention.chunked import Chunks, attend_in_chunks
from jax_backtrack.models.attention.dense import attend
from jax_backtrack.models.attention.pallas.tree_attention import BlockMap, Blocks, block_map, tree_attention

KINDS = ("dot_product", "chunked", "blockwise", "pallas")
# The kernel is for TPUs alone. Blocks are chosen at run time, for which a GPU waits for its host.
_BEST = {"tpu": "pallas", "gpu": "chunked"}


def best_kind(platform: str) -> str:
    """The kind of attention for this kind of device, "cpu", "gpu" or "tpu"."""
    return _BEST.get(platform, "blockwise")


def check_kind(kind: str, platform: str) -> None:
    """Raises InputError for the TPU kernel on a GPU, where Pallas would interpret it, slower than anything else."""
    if kind == "pallas" and platform == "gpu":
        raise InputError(
            f"model.attention = 'pallas' is for TPUs, and this is a GPU: choose '{best_kind(platform)}' or 'auto'"
        )


def view(
    kind: str, blocks: Blocks, position_BxS: jax.Array, end_BxS: jax.Array, window: int | None
) -> jax.Array | Chunks | Seen | tuple[jax.Array, jax.Array, BlockMap]:
    """Who sees whom in a batch of rows, in the form that this kind of attention follows; one for all layers."""
    length = end_BxS.shape[1]
    if kind == "pallas" and blocks.splits(length):
        return position_BxS, end_BxS, block_map(position_BxS, end_BxS, window, blocks)
    if kind == "chunked":
        return Chunks(position_BxS, end_BxS, window)
    if kind == "blockwise" and length > blocks.query:
        return seen_blocks(position_BxS, end_BxS, window, blocks)
    return attention_rule(position_BxS, end_BxS, window)


def attend_within_trees(
    query_BxSxNxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    view: Any,
    *,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None,
) -> jax.Array:
    """`attend` under `trees.attention_rule`, each device for its own rows and heads; `view` is what `view` gives.

    On a CPU the kernel is interpreted, which is slow.
    """
    operands, settings = (query_BxSxNxD, key_BxSxKxD, value_BxSxKxD), dict(scale=scale, softcap=softcap)
    if isinstance(view, jax.Array):
        return attend(*operands, view, **settings)
    if isinstance(view, Chunks):
        return attend_in_chunks(*operands, view, **settings)
    if isinstance(view, Seen):
        return _on_each_device(functools.partial(attend_by_blocks, **settings), operands, view, mesh, check=False)
    check_kind("pallas", platform(mesh))
    interpret = platform(mesh) != "tpu"
    map = view[2]
    kernel = functools.partial(tree_attention, window=map.window, blocks=map.blocks, interpret=interpret, **settings)

    def by_kernel(query, key, value, view):
        position, end, map = view
        return kernel(query, key, value, position, end, map=map)

    # The interpreter's own operations do not say which mesh axes they vary along.
    return _on_each_device(by_kernel, operands, view, mesh, check=not interpret)


def _on_each_device(function, operands, view, mesh: Mesh | None, check: bool) -> jax.Array:
    if mesh is None or mesh.size == 1:
        return function(*operands, view)
    rows, queries, keys = (partition(axes, "computed") for axes in ("B", "BxSxNxD", "BxSxKxD"))
    in_specs = queries, keys, keys, rows
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=check)(*operands, view)
