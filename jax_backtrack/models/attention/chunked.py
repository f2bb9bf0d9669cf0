"""Attention of token trees in chunks of queries, each dense: what a GPU computes.

A chunk attends to every key up to its own last token, so shapes are known when the program is compiled, and no branch
depends on the data. A row costs a little more than half of dense attention, and scores of one chunk exist at a time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jax_backtrack.backtracking.trees import tree_attention_mask
from jax_backtrack.models.attention.dense import attend

CHUNK = 512  # queries


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """The rows' `position` and `end`, int32 `[B, S]`, and the window: what `attend_in_chunks` follows."""

    position: jax.Array
    end: jax.Array
    window: int | None = dataclasses.field(metadata=dict(static=True))


def attend_in_chunks(
    query_BxSxNxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    chunks: Chunks,
    *,
    scale: float,
    softcap: float | None = None,
    size: int = CHUNK,
) -> jax.Array:
    """Attends under `trees.tree_attention_mask`, `[B, S, N, D]`; a row of up to `size` tokens is one chunk.

    The backward pass computes the scores of a chunk anew instead of keeping them.
    """
    length = query_BxSxNxD.shape[1]

    @functools.partial(jax.checkpoint, static_argnums=(0, 1))
    def of_chunk(first, last, query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, position_BxS, end_BxS):
        visible_BxTxS = tree_attention_mask(position_BxS[:, :last], end_BxS[:, :last], chunks.window, first)
        keys_and_values = key_BxSxKxD[:, :last], value_BxSxKxD[:, :last]
        return attend(query_BxSxNxD[:, first:last], *keys_and_values, visible_BxTxS, scale=scale, softcap=softcap)

    operands = query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, chunks.position, chunks.end
    firsts = range(0, length, size)
    return jnp.concatenate([of_chunk(first, min(first + size, length), *operands) for first in firsts], axis=1)
