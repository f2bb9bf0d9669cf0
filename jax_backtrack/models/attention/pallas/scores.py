"""What the forward and backward kernels share: the scores of one pair of blocks, and their place in the grid.

In the kernels `Q` is the queries of a block and `C` its keys. Where the softmax is taken, and for the gradients of keys
and values, scores lie as `CxQ`, keys down and queries across: what belongs to a query (its maximum, its sum, its
log-sum-exp) is then a row of one register per 1,024 queries instead of a column that fills a register per 8, and a
softmax reduces over sublanes, which costs no exchange between lanes. For the gradient of queries they lie as `QxC`,
so that no matrix of scores has to be turned over before a product.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_backtrack.models.attention.pallas.block_map import BlockMap

# Far below any score, and far enough from -inf that differences of two of them are 0 and never NaN.
HIDDEN = -0.5 * float(jnp.finfo(jnp.float32).max)
END, POSITION = 0, 1  # rows of `place`


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores come about: `scale * q.k`, bent by `softcap`, hidden beyond `window` positions."""

    scale: float
    softcap: float | None
    window: int | None


@dataclasses.dataclass(frozen=True)
class Visit:
    """One grid step: a pair of blocks.

    live:  the list of visits is not yet over
    first: the first visit of the block that is accumulated into
    last:  its last visit
    """

    query: jax.Array
    key: jax.Array
    live: jax.Array
    first: jax.Array
    last: jax.Array


def visit(query_ref, key_ref, count_ref, major_ref, row, step) -> Visit:
    """Returns the visit at `step` of a row's list; `major_ref`, `query_ref` or `key_ref`, is accumulated into."""
    count = count_ref[row]
    before, after = jnp.maximum(step - 1, 0), jnp.minimum(step + 1, major_ref.shape[1] - 1)
    major = major_ref[row, step]
    live = step < count
    return Visit(
        query=query_ref[row, step],
        key=key_ref[row, step],
        live=live,
        first=(step == 0) | (live & (major_ref[row, before] != major)),
        last=(step == count - 1) | (live & (major_ref[row, after] != major)),
    )


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Multiplies matrices in float32 over one axis of each; float32 inputs are multiplied at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def visibility(place_query_2x1xQ, place_key_2x1xC, at: Visit, rule: Rule, down: str) -> jax.Array:
    """`trees.tree_attention_mask` for one pair of blocks: bool `[C, Q]` with `down` "key", `[Q, C]` with "query"."""
    queries, keys = place_query_2x1xQ.shape[2], place_key_2x1xC.shape[2]
    shape = (keys, queries) if down == "key" else (queries, keys)
    key_axis, query_axis = (0, 1) if down == "key" else (1, 0)
    key = at.key * keys + jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
    query = at.query * queries + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    visible = (key <= query) & (query < jnp.expand_dims(place_key_2x1xC[END, 0], query_axis))
    if rule.window is not None:
        query_position = jnp.expand_dims(place_query_2x1xQ[POSITION, 0], key_axis)
        visible &= query_position - jnp.expand_dims(place_key_2x1xC[POSITION, 0], query_axis) < rule.window
    return visible


def scores(down_MxD, across_NxD, visible_MxN, rule: Rule) -> tuple[jax.Array, jax.Array | None]:
    """Scores `[M, N]` of keys and queries, whichever lie down, in float32, and the derivative of the soft-cap if any.

    They are HIDDEN where not visible.
    """
    score_MxN = rule.scale * dot(down_MxD, across_NxD, (1, 1))
    slope_MxN = None
    if rule.softcap is not None:
        bent_MxN = jnp.tanh(score_MxN * (1 / rule.softcap))
        score_MxN = rule.softcap * bent_MxN
        slope_MxN = 1 - bent_MxN * bent_MxN
    return jnp.where(visible_MxN, score_MxN, HIDDEN), slope_MxN


def struct(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns a kernel's output, varying over the mesh axes that `like` varies over, as `jax.shard_map` asks."""
    kind = jax.typeof(like)
    varying = "manual_axis_type" if hasattr(kind, "manual_axis_type") else "vma"  # what older releases call it
    return jax.ShapeDtypeStruct(shape, dtype, **{varying: getattr(kind, varying)})


def cost(matmuls: int, query_BxNxSxD: jax.Array, map: BlockMap, rule: Rule, arrays: list) -> pl.CostEstimate:
    """Returns what a compiler may assume of a kernel with so many matrix products per pair of blocks.

    Which blocks are visible is known only when the program runs, so this counts the visible blocks of a causal row:
    the most there can be. Every array is counted as moved once.
    """
    batch, heads, _, dim = query_BxNxSxD.shape
    pairs = batch * heads * map.by_query.query.shape[1] * map.blocks.query * map.blocks.key
    return pl.CostEstimate(
        flops=2 * matmuls * dim * pairs,
        transcendentals=pairs * (1 if rule.softcap is None else 2),
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    )
