"""What the forward and backward kernels share: the scores of one pair of blocks, and their place in the grid.

In the kernels `Q` is the queries of a block and `C` its keys. Scores lie as `CxQ`, keys down and queries across: what
belongs to a query (its maximum, its sum, its log-sum-exp) is then a row of one register per 1,024 queries instead of a
column that fills a register per 8, and a softmax reduces over sublanes, which costs no exchange between lanes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jax_backtrack.kernels.block_map import BlockMap

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
    """The visit at `step` of a row's list; `major_ref` is `query_ref` or `key_ref`: what is accumulated into."""
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
    """Matrix product in float32 over one axis of each; float32 inputs are multiplied at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def visibility(place_query_2xQ, place_key_2xC, at: Visit, rule: Rule) -> jax.Array:
    """bool `[C, Q]`: `trees.attention_rule` for one pair of blocks."""
    shape = place_key_2xC.shape[1], place_query_2xQ.shape[1]
    key = at.key * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = at.query * shape[1] + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    visible_CxQ = (key <= query) & (query < place_key_2xC[END][:, None])
    if rule.window is not None:
        visible_CxQ &= place_query_2xQ[POSITION][None, :] - place_key_2xC[POSITION][:, None] < rule.window
    return visible_CxQ


def scores(query_QxD, key_CxD, visible_CxQ, rule: Rule) -> tuple[jax.Array, jax.Array | None]:
    """Scores `[C, Q]` in float32, HIDDEN where not visible, and the derivative of the soft-cap, where there is one."""
    score_CxQ = rule.scale * dot(key_CxD, query_QxD, (1, 1))
    slope_CxQ = None
    if rule.softcap is not None:
        bent_CxQ = jnp.tanh(score_CxQ * (1 / rule.softcap))
        score_CxQ = rule.softcap * bent_CxQ
        slope_CxQ = 1 - bent_CxQ * bent_CxQ
    return jnp.where(visible_CxQ, score_CxQ, HIDDEN), slope_CxQ


def struct(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """A kernel's output, varying over the mesh axes that `like` varies over, as `jax.shard_map` wants to know."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def cost(matmuls: int, query_BxNxSxD: jax.Array, map: BlockMap, rule: Rule, arrays: list) -> pl.CostEstimate:
    """What a compiler may assume of a kernel with so many matrix products per pair of blocks.

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
