"""Which blocks of the attention matrix a row of token trees needs, as lists that a kernel's grid can follow.

A pair of blocks is *visible* where any of its queries may attend to any of its keys. The kernels visit visible pairs
only: one grid step each, in an order that keeps the block they accumulate into in place.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_backtrack.errors import InputError


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the blocks that a kernel holds at once, in tokens.

    A row shorter than a block makes one block. Otherwise a row's length is a multiple of both sizes, and both are
    multiples of 128, the lanes of a TPU's vector registers. Larger blocks keep the matrix unit busier and need more
    VMEM; smaller ones skip more of a tree.

    `heads` is how many query heads of one key head a grid step handles together: up to so many, as they divide the
    group. They share the step's mask, its keys and its fixed cost, which weighs on small blocks; each needs VMEM.
    """

    query: int = 512
    key: int = 512
    heads: int = 1

    def fit(self, length: int) -> "BlockSizes":
        """Returns the sizes for rows of `length` tokens; InputError where they do not divide it."""
        fitted = BlockSizes(min(self.query, length), min(self.key, length), self.heads)
        for name, size in (("query", fitted.query), ("key", fitted.key)):
            if size < 1 or length % size:
                raise InputError(
                    f"rows of {length} tokens do not split into {name} blocks of {size}: make the row length a multiple"
                    f" of {size}, or choose another BlockSizes({name}=...)"
                )
        return fitted

    def splits(self, length: int) -> bool:
        """Tells whether rows of `length` tokens split into these blocks, on a TPU too."""
        sizes = min(self.query, length), min(self.key, length)
        return all(length % size == 0 and (size % 128 == 0 or size == length) for size in sizes)

    def heads_of(self, group: int) -> int:
        """Heads of a group of so many that are handled together."""
        return max(count for count in range(1, max(1, self.heads) + 1) if group % count == 0)

    def check_lanes(self, length: int) -> None:
        """Raises InputError where fitted sizes cannot be laid out on a TPU."""
        for name, size in (("query", self.query), ("key", self.key)):
            if size != length and size % 128:
                raise InputError(
                    f"{name} blocks of {size} tokens: a TPU needs a multiple of 128, or one block for the whole row of"
                    f" {length}; choose another BlockSizes({name}=...)"
                )


class BlockSchedule(NamedTuple):
    """Visible pairs of blocks, one after the other. Behind the last one it is repeated, so that nothing new is fetched.

    query, key: int32 `[B, V]`, block numbers; V is the number of pairs in a causal row, the most there can be
    count:      int32 `[B]`, how many of them there are
    """

    query: jax.Array
    key: jax.Array
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The visible pairs of blocks of a batch of rows in two orders. Every array has the batch as its first axis.

    by_query: all keys of the first query block, then of the second, and so on, ascending
    by_key:   all queries of the first key block, then of the second, and so on, ascending
    window, blocks: what it was made for (blocks as they fit the row)
    """

    by_query: BlockSchedule
    by_key: BlockSchedule
    window: int | None = dataclasses.field(metadata=dict(static=True))
    blocks: BlockSizes = dataclasses.field(metadata=dict(static=True))


def causal_pairs(length: int, blocks: BlockSizes) -> np.ndarray:
    """Returns bool `[I, J]`: blocks of a plain sequence in which some key does not come after every query."""
    last_query = np.arange(blocks.query, length + 1, blocks.query) - 1
    first_key = np.arange(0, length, blocks.key)
    return first_key[None, :] <= last_query[:, None]


def visible_blocks(
    position_BxS: jax.Array, end_BxS: jax.Array, window: int | None = None, blocks: BlockSizes = BlockSizes()
) -> jax.Array:
    """Returns bool `[B, I, J]`: some query of a block attends to some key of a block, by `trees.tree_attention_mask`.

    Exact, for rows in which every token sees itself (`end > index`, `window >= 1`). Without a window no query needs to
    be looked at: if a key block stands before a query block, and the subtree of one of its keys reaches the block's
    first query, then that pair is visible; and if none reaches the first query, none reaches a later one. With a
    window the rule is reduced one query block at a time, over `[B, query, S]`.
    """
    length = end_BxS.shape[1]
    blocks = blocks.fit(length)
    causal_IxJ = jnp.asarray(causal_pairs(length, blocks))
    if window is None:
        last_end_BxC = end_BxS.reshape(len(end_BxS), -1, blocks.key).max(axis=-1)
        first_query_Q = jnp.arange(0, length, blocks.query)
        return causal_IxJ & (last_end_BxC[:, None, :] > first_query_Q[None, :, None])

    key_S = jnp.arange(length)

    def of_query_block(first):
        query_T = first + jnp.arange(blocks.query)
        position_BxT = jax.lax.dynamic_slice_in_dim(position_BxS, first, blocks.query, axis=1)
        visible_BxTxS = (key_S <= query_T[:, None]) & (query_T[:, None] < end_BxS[:, None, :])
        visible_BxTxS &= position_BxT[:, :, None] - position_BxS[:, None, :] < window
        return visible_BxTxS.any(axis=1).reshape(len(end_BxS), -1, blocks.key).any(axis=-1)

    visible_QxBxC = jax.lax.map(of_query_block, jnp.arange(0, length, blocks.query))
    return jnp.moveaxis(visible_QxBxC, 0, 1)


def block_map(
    position_BxS: jax.Array, end_BxS: jax.Array, window: int | None = None, blocks: BlockSizes = BlockSizes()
) -> BlockMap:
    """Returns the visits of a batch, for `tree_attention(map=...)`. Traceable; one for all layers of one window."""
    blocks = blocks.fit(end_BxS.shape[1])
    visible_BxIxJ = visible_blocks(position_BxS, end_BxS, window, blocks)
    most = int(causal_pairs(end_BxS.shape[1], blocks).sum())
    query, key, count = _listed(visible_BxIxJ, most)
    by_key_key, by_key_query, _ = _listed(visible_BxIxJ.swapaxes(1, 2), most)
    return BlockMap(BlockSchedule(query, key, count), BlockSchedule(by_key_query, by_key_key, count), window, blocks)


def _listed(visible_BxIxJ: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns indices of the True entries along both axes, in order, `[B, Y = most]`, and how many there are, `[B]`."""
    flat_BxE = visible_BxIxJ.reshape(len(visible_BxIxJ), -1)
    seen_BxE = jnp.cumsum(flat_BxE, axis=1, dtype=jnp.int32)
    count_B = seen_BxE[:, -1]
    # The entry of visit v is the first one up to which v + 1 are visible. Counted, not sorted: a TPU's compiler takes
    # long over a sort.
    visit_BxY = jnp.minimum(jnp.arange(most), count_B[:, None] - 1)
    entry_BxY = jnp.sum(seen_BxE[:, None, :] <= visit_BxY[:, :, None], axis=-1, dtype=jnp.int32)
    return *jnp.divmod(entry_BxY, visible_BxIxJ.shape[2]), count_B
