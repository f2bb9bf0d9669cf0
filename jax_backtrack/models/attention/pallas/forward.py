"""The forward kernel: attention output and log-sum-exp of every query, one query block after the other.

The running maximum and sum are those of FlashAttention-2 (arXiv 2307.08691, algorithm 1), over the visible key blocks
only. Layout and letters are explained in scores.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_backtrack.models.attention.pallas.block_map import BlockMap
from jax_backtrack.models.attention.pallas.scores import HIDDEN, Rule, cost, dot, scores, struct, visibility, visit


def forward(
    query_BxNxSxD: jax.Array,
    key_BxKxSxD: jax.Array,
    value_BxKxSxD: jax.Array,
    place_Bx2x1xS: jax.Array,
    map: BlockMap,
    rule: Rule,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns mixed values `[B, N, S, D]` in the query's dtype, and the scores' log-sum-exp, float32 `[B, N, 1, S]`."""
    batch, heads, length, dim = query_BxNxSxD.shape
    group = heads // key_BxKxSxD.shape[1]
    together = map.blocks.heads_of(group)
    steps = map.by_query.count.max()

    def query_block(b, n, step, query, key, count):
        return b, n, query[b, step], 0

    def key_block(b, n, step, query, key, count):
        return b, jax.lax.div(n * together, group), key[b, step], 0

    operands = [*map.by_query, query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, place_Bx2x1xS]
    out_shape = [
        struct(query_BxNxSxD.shape, query_BxNxSxD.dtype, query_BxNxSxD),
        struct((batch, heads, 1, length), jnp.float32, query_BxNxSxD),
    ]
    return pl.pallas_call(
        functools.partial(_kernel, rule=rule),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads // together, steps),
            in_specs=[
                pl.BlockSpec((None, together, map.blocks.query, dim), query_block),
                pl.BlockSpec((None, None, map.blocks.key, dim), key_block),
                pl.BlockSpec((None, None, map.blocks.key, dim), key_block),
                pl.BlockSpec(
                    (None, 2, 1, map.blocks.query), lambda b, n, step, query, key, count: (b, 0, 0, query[b, step])
                ),
                pl.BlockSpec(
                    (None, 2, 1, map.blocks.key), lambda b, n, step, query, key, count: (b, 0, 0, key[b, step])
                ),
            ],
            out_specs=[
                pl.BlockSpec((None, together, map.blocks.query, dim), query_block),
                pl.BlockSpec(
                    (None, together, 1, map.blocks.query),
                    lambda b, n, step, query, key, count: (b, n, 0, query[b, step]),
                ),
            ],
            scratch_shapes=[
                pltpu.VMEM((together, 1, map.blocks.query), jnp.float32),
                pltpu.VMEM((together, 1, map.blocks.query), jnp.float32),
                pltpu.VMEM((together, dim, map.blocks.query), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(2, query_BxNxSxD, map, rule, operands + out_shape),
        name="tree_attention_forward",
        interpret=interpret,
    )(*operands)


def _kernel(
    visit_query, visit_key, count, query_ref, key_ref, value_ref, place_query_ref, place_key_ref,
    mixed_ref, logsumexp_ref, max_ref, sum_ref, mixed_sum_ref, *, rule: Rule,
):  # fmt: skip
    at = visit(visit_query, visit_key, count, visit_query, pl.program_id(0), pl.program_id(2))

    @pl.when(at.first)
    def _():
        max_ref[...] = jnp.full_like(max_ref, HIDDEN)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        mixed_sum_ref[...] = jnp.zeros_like(mixed_sum_ref)

    @pl.when(at.live)
    def _():
        key_CxD, value_CxD = key_ref[...], value_ref[...]
        visible_CxQ = visibility(place_query_ref[...], place_key_ref[...], at, rule, down="key")
        for head in range(query_ref.shape[0]):
            score_CxQ, _ = scores(key_CxD, query_ref[head], visible_CxQ, rule)
            max_1xQ = jnp.maximum(max_ref[head], score_CxQ.max(axis=0, keepdims=True))
            # A query that has seen no key yet takes up weights of exp(0) here; its own key comes last, and brings a
            # maximum next to which they shrink to exactly 0.
            weight_CxQ = jnp.exp(score_CxQ - max_1xQ)
            shrink_1xQ = jnp.exp(max_ref[head] - max_1xQ)
            max_ref[head] = max_1xQ
            sum_ref[head] = shrink_1xQ * sum_ref[head] + weight_CxQ.sum(axis=0, keepdims=True)
            mixed_DxQ = dot(value_CxD, weight_CxQ.astype(value_CxD.dtype), (0, 0))
            mixed_sum_ref[head] = shrink_1xQ * mixed_sum_ref[head] + mixed_DxQ

    @pl.when(at.last)
    def _():
        for head in range(query_ref.shape[0]):
            mixed_ref[head] = (mixed_sum_ref[head] / sum_ref[head]).T.astype(mixed_ref.dtype)
            logsumexp_ref[head] = max_ref[head] + jnp.log(sum_ref[head])
