"""Attention of token trees by blocks, in plain JAX: what devices without the kernel compute.

A block of queries attends to the blocks of keys that any of its queries sees, gathered side by side. So the cost of a
row grows with its length, not with its square, and scores of one block of queries exist at a time, in cache.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jax_backtrack.models.attention.dense import attend
from jax_backtrack.models.attention.pallas.block_map import BlockSizes, visible_blocks

BLOCKS = BlockSizes(query=128, key=64)  # the fastest of 64 to 256 on CPU
_GROWTH = 4 / 3  # of the numbers of key blocks that attention is compiled for: at most a third more than are seen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """The key blocks that every query block sees; Q and C count blocks of a row that is padded to whole ones.

    order:    int32 `[B, I, J]`, numbers of key blocks, those that are seen first, ascending
    count:    int32 `[B, I]`, how many are seen
    position, end: int32 `[B, S]`, the rows' own, padded
    """

    order: jax.Array
    count: jax.Array
    position: jax.Array
    end: jax.Array
    window: int | None = dataclasses.field(metadata=dict(static=True))
    blocks: BlockSizes = dataclasses.field(metadata=dict(static=True))


def block_mask(
    position_BxS: jax.Array, end_BxS: jax.Array, window: int | None = None, blocks: BlockSizes = BLOCKS
) -> BlockMask:
    """Returns what `attend_by_blocks` follows. Traceable; one for all layers of one window."""
    # Padding ends before it begins, so that no token sees it.
    position_BxS, end_BxS = (_padded(array, blocks) for array in (position_BxS, end_BxS))
    visible_BxIxJ = visible_blocks(position_BxS, end_BxS, window, blocks)
    order_BxIxJ = jnp.argsort(~visible_BxIxJ, axis=-1, stable=True).astype(jnp.int32)
    return BlockMask(order_BxIxJ, jnp.sum(visible_BxIxJ, -1, dtype=jnp.int32), position_BxS, end_BxS, window, blocks)


def attend_by_blocks(
    query_BxSxNxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    mask: BlockMask,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attends under `trees.tree_attention_mask`, `[B, S, N, D]`. Differentiable once in query, key and value.

    The backward pass computes the scores of a block anew instead of keeping them.
    """
    length = query_BxSxNxD.shape[1]
    padded = [_padded(array, mask.blocks) for array in (query_BxSxNxD, key_BxSxKxD, value_BxSxKxD)]
    return _attend(scale, softcap, *padded, mask)[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, softcap, query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, mask: BlockMask):
    batch, length, heads, dim = query_BxSxNxD.shape

    def of_block(place):
        row, first = place
        query_TxNxD = _query_block(query_BxSxNxD, row, first, mask.blocks)

        def with_keys(count: int):
            chosen = _Chosen(mask, row, first, count)
            return chosen.mix(scale, softcap)(query_TxNxD, chosen.gather(key_BxSxKxD), chosen.gather(value_BxSxKxD))

        return _for_as_many_as_seen(mask, row, first, with_keys)

    return jax.lax.map(of_block, _places(mask)).reshape(batch, length, heads, dim)


def _forward(scale, softcap, query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, mask):
    operands = query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, mask
    return _attend(scale, softcap, *operands), operands


def _backward(scale, softcap, operands, dmixed_BxSxNxD):
    query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, mask = operands

    def of_block(sums, place):
        row, first = place
        query_TxNxD = _query_block(query_BxSxNxD, row, first, mask.blocks)
        dmixed_TxNxD = _query_block(dmixed_BxSxNxD, row, first, mask.blocks)

        def with_keys(count: int, dkey_BxSxKxD, dvalue_BxSxKxD):
            chosen = _Chosen(mask, row, first, count)
            operands = query_TxNxD, chosen.gather(key_BxSxKxD), chosen.gather(value_BxSxKxD)
            dquery_TxNxD, dkey, dvalue = jax.vjp(chosen.mix(scale, softcap), *operands)[1](dmixed_TxNxD)
            return chosen.add(dkey_BxSxKxD, dkey), chosen.add(dvalue_BxSxKxD, dvalue), dquery_TxNxD

        *sums, dquery_TxNxD = _for_as_many_as_seen(mask, row, first, with_keys, *sums)
        return tuple(sums), dquery_TxNxD

    none_BxSxKxD = jnp.zeros(key_BxSxKxD.shape, jnp.float32)
    sums, dquery = jax.lax.scan(of_block, (none_BxSxKxD, none_BxSxKxD), _places(mask))
    dkey_BxSxKxD, dvalue_BxSxKxD = (array.astype(key_BxSxKxD.dtype) for array in sums)
    return dquery.reshape(query_BxSxNxD.shape), dkey_BxSxKxD, dvalue_BxSxKxD, None


_attend.defvjp(_forward, _backward)


class _Chosen:
    """The first `count` key blocks in the order of one query block, side by side."""

    def __init__(self, mask: BlockMask, row: jax.Array, first: jax.Array, count: int):
        self._size, self._row = mask.blocks.key, row
        order_J, seen_count = (array[row, first // mask.blocks.query] for array in (mask.order, mask.count))
        self._blocks = order_J[:count]
        query_T = first + jnp.arange(mask.blocks.query)
        key_S = (self._blocks[:, None] * self._size + jnp.arange(self._size)).reshape(-1)
        visible_TxS = (key_S <= query_T[:, None]) & (query_T[:, None] < self.gather(mask.end))
        visible_TxS &= jnp.repeat(jnp.arange(count) < seen_count, self._size)
        if mask.window is not None:
            position_T = mask.position[row, query_T]
            visible_TxS &= position_T[:, None] - self.gather(mask.position) < mask.window
        self._visible_TxS = visible_TxS

    def gather(self, array_BxS: jax.Array) -> jax.Array:
        """Returns these blocks of the row of an array `[B, S, ...]`."""
        in_blocks = array_BxS[self._row].reshape(-1, self._size, *array_BxS.shape[2:])
        return in_blocks[self._blocks].reshape(-1, *array_BxS.shape[2:])

    def add(self, sum_BxS: jax.Array, part_S: jax.Array) -> jax.Array:
        """Adds to an array `[B, S, ...]` what was computed of `gather`'s."""
        batch, length, *rest = sum_BxS.shape
        in_blocks = sum_BxS.reshape(batch, -1, self._size, *rest)
        part = part_S.reshape(-1, self._size, *rest).astype(sum_BxS.dtype)
        return in_blocks.at[self._row, self._blocks].add(part).reshape(batch, length, *rest)

    def mix(self, scale: float, softcap: float | None):
        """Attends from the query block to these keys and values, without a batch."""

        def of_one(query_TxNxD, key_SxKxD, value_SxKxD):
            operands = query_TxNxD, key_SxKxD, value_SxKxD, self._visible_TxS
            return attend(*(array[None] for array in operands), scale=scale, softcap=softcap)[0]

        return of_one


def _places(mask: BlockMask) -> tuple[jax.Array, jax.Array]:
    """Returns row and first token of every query block of the batch."""
    batch, queries, _ = mask.order.shape
    row, block = jnp.divmod(jnp.arange(batch * queries), queries)
    return row, block * mask.blocks.query


def _query_block(array_BxSxNxD: jax.Array, row, first, blocks: BlockSizes) -> jax.Array:
    _, _, heads, dim = array_BxSxNxD.shape
    return jax.lax.dynamic_slice(array_BxSxNxD, (row, first, 0, 0), (1, blocks.query, heads, dim))[0]


def _for_as_many_as_seen(mask: BlockMask, row, first, function, *operands):
    """Calls `function(count, *operands)` for the smallest of some static counts that covers all that is seen."""
    most = mask.order.shape[2]
    steps = range(1 + math.ceil(math.log(most, _GROWTH)))
    counts = sorted({min(most, math.ceil(_GROWTH**step)) for step in steps})
    branches = [functools.partial(function, count) for count in counts]
    needed = mask.count[row, first // mask.blocks.query]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(counts), needed), branches, *operands)


def _padded(array_BxS: jax.Array, blocks: BlockSizes) -> jax.Array:
    missing = -array_BxS.shape[1] % math.lcm(blocks.query, blocks.key)
    return jnp.pad(array_BxS, [(0, 0), (0, missing)] + [(0, 0)] * (array_BxS.ndim - 2))
