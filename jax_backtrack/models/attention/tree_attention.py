"""How a model attends within token trees: densely, in chunks, by blocks, or by the TPU kernel."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from jax_backtrack.backtracking.trees import tree_attention_mask
from jax_backtrack.distributed.mesh import logical_to_spec, platform
from jax_backtrack.errors import InputError
from jax_backtrack.models.attention.blockwise import BlockMask, attend_by_blocks, block_mask
from jax_backtrack.models.attention.chunked import Chunks, attend_in_chunks
from jax_backtrack.models.attention.dense import attend
from jax_backtrack.models.attention.pallas.tree_attention import BlockMap, BlockSizes, block_map, tree_attention

KINDS = ("dot_product", "chunked", "blockwise", "pallas")
# The kernel is for TPUs alone. Blocks are chosen at run time, for which a GPU waits for its host.
_BEST = {"tpu": "pallas", "gpu": "chunked"}


def best_kind(platform: str) -> str:
    """Returns the kind of attention for this kind of device, "cpu", "gpu" or "tpu"."""
    return _BEST.get(platform, "blockwise")


def check_kind(kind: str, platform: str) -> None:
    """Raises InputError for the TPU kernel on a GPU, where Pallas would interpret it, slower than anything else."""
    if kind == "pallas" and platform == "gpu":
        raise InputError(
            f"model.attention = 'pallas' is for TPUs, and this is a GPU: choose '{best_kind(platform)}' or 'auto'"
        )


def make_mask(
    kind: str, blocks: BlockSizes, position_BxS: jax.Array, end_BxS: jax.Array, window: int | None
) -> jax.Array | Chunks | BlockMask | tuple[jax.Array, jax.Array, BlockMap]:
    """Returns who sees whom in a batch of rows, in the form that this kind of attention follows; one for all layers."""
    length = end_BxS.shape[1]
    if kind == "pallas" and blocks.splits(length):
        return position_BxS, end_BxS, block_map(position_BxS, end_BxS, window, blocks)
    if kind == "chunked":
        return Chunks(position_BxS, end_BxS, window)
    if kind == "blockwise" and length > blocks.query:
        return block_mask(position_BxS, end_BxS, window, blocks)
    return tree_attention_mask(position_BxS, end_BxS, window)


def attend_within_trees(
    query_BxSxNxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    mask: Any,
    *,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None,
) -> jax.Array:
    """Attends under `trees.tree_attention_mask`, each device for its own rows and heads; `mask` is from `make_mask`.

    On a CPU the kernel is interpreted, which is slow.
    """
    operands, settings = (query_BxSxNxD, key_BxSxKxD, value_BxSxKxD), dict(scale=scale, softcap=softcap)
    if isinstance(mask, jax.Array):
        return attend(*operands, mask, **settings)
    if isinstance(mask, Chunks):
        return attend_in_chunks(*operands, mask, **settings)
    if isinstance(mask, BlockMask):
        return _on_each_device(functools.partial(attend_by_blocks, **settings), operands, mask, mesh, check=False)
    check_kind("pallas", platform(mesh))
    interpret = platform(mesh) != "tpu"
    map = mask[2]
    kernel = functools.partial(tree_attention, window=map.window, blocks=map.blocks, interpret=interpret, **settings)

    def by_kernel(query, key, value, mask):
        position, end, map = mask
        return kernel(query, key, value, position, end, map=map)

    # The interpreter's own operations do not say which mesh axes they vary along.
    return _on_each_device(by_kernel, operands, mask, mesh, check=not interpret)


def _on_each_device(function, operands, mask, mesh: Mesh | None, check: bool) -> jax.Array:
    if mesh is None or mesh.size == 1:
        return function(*operands, mask)
    rows, queries, keys = (logical_to_spec(axes, "computed") for axes in ("B", "BxSxNxD", "BxSxKxD"))
    in_specs = queries, keys, keys, rows
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=check)(*operands, mask)
