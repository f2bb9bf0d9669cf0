"""The backward kernels: one for the gradient of queries, one for that of keys and values.

Weights are recomputed from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691, algorithm 2). Layout and letters
are explained in scores.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_backtrack.models.attention.pallas.block_map import BlockMap
from jax_backtrack.models.attention.pallas.scores import Rule, cost, dot, scores, struct, visibility, visit


def backward_query(
    query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, logsumexp_BxNx1xS, dmixed_BxNxSxD, delta_BxNx1xS,
    map: BlockMap, rule: Rule, interpret: bool,
) -> jax.Array:  # fmt: skip
    """Returns the gradient of the queries, `[B, N, S, D]`, one query block after the other.

    `delta` is the inner product of every query's output with its gradient, float32.
    """
    batch, heads, _, dim = query_BxNxSxD.shape
    group = heads // key_BxKxSxD.shape[1]
    together = map.blocks.heads_of(group)
    queries, keys = map.blocks.query, map.blocks.key

    def of_query(b, n, step, query, key, count):
        return b, n, query[b, step], 0

    def of_key(b, n, step, query, key, count):
        return b, jax.lax.div(n * together, group), key[b, step], 0

    def along_query(b, n, step, query, key, count):
        return b, n, 0, query[b, step]

    operands = [
        *map.by_query, query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, place_Bx2x1xS,
        logsumexp_BxNx1xS, dmixed_BxNxSxD, delta_BxNx1xS,
    ]  # fmt: skip
    out_shape = struct(query_BxNxSxD.shape, query_BxNxSxD.dtype, query_BxNxSxD)
    return pl.pallas_call(
        functools.partial(_query_kernel, rule=rule),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, heads // together, map.by_query.count.max()),
            in_specs=[
                pl.BlockSpec((None, together, queries, dim), of_query),
                pl.BlockSpec((None, None, keys, dim), of_key),
                pl.BlockSpec((None, None, keys, dim), of_key),
                pl.BlockSpec((None, 2, 1, queries), lambda b, n, step, query, key, count: (b, 0, 0, query[b, step])),
                pl.BlockSpec((None, 2, 1, keys), lambda b, n, step, query, key, count: (b, 0, 0, key[b, step])),
                pl.BlockSpec((None, together, 1, queries), along_query),
                pl.BlockSpec((None, together, queries, dim), of_query),
                pl.BlockSpec((None, together, 1, queries), along_query),
            ],
            out_specs=pl.BlockSpec((None, together, queries, dim), of_query),
            scratch_shapes=[pltpu.VMEM((together, queries, dim), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost(3, query_BxNxSxD, map, rule, [*operands, out_shape]),
        name="tree_attention_backward_dq",
        interpret=interpret,
    )(*operands)


def _query_kernel(
    visit_query, visit_key, count, query_ref, key_ref, value_ref, place_query_ref, place_key_ref,
    logsumexp_ref, dmixed_ref, delta_ref, dquery_ref, dquery_sum_ref, *, rule: Rule,
):  # fmt: skip
    at = visit(visit_query, visit_key, count, visit_query, pl.program_id(0), pl.program_id(2))

    @pl.when(at.first)
    def _():
        dquery_sum_ref[...] = jnp.zeros_like(dquery_sum_ref)

    @pl.when(at.live)
    def _():
        key_CxD, value_CxD = key_ref[...], value_ref[...]
        visible_QxC = visibility(place_query_ref[...], place_key_ref[...], at, rule, down="query")
        for head in range(query_ref.shape[0]):
            score_QxC, slope_QxC = scores(query_ref[head], key_CxD, visible_QxC, rule)
            weight_QxC = jnp.exp(score_QxC - logsumexp_ref[head, 0][:, None])
            dweight_QxC = dot(dmixed_ref[head], value_CxD, (1, 1))
            dscore_QxC = _dscore(weight_QxC, slope_QxC, dweight_QxC, delta_ref[head, 0][:, None])
            dquery_sum_ref[head] += dot(dscore_QxC.astype(key_CxD.dtype), key_CxD, (1, 0))

    @pl.when(at.last)
    def _():
        dquery_ref[...] = (rule.scale * dquery_sum_ref[...]).astype(dquery_ref.dtype)


def backward_key_value(
    query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, logsumexp_BxNx1xS, dmixed_BxNxSxD, delta_BxNx1xS,
    map: BlockMap, rule: Rule, interpret: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Gradients of keys and values, `[B, K, S, D]` each, one key block after the other.

    The innermost grid axis runs over the query heads that share a key head, so that their gradients add up in place.
    """
    batch, heads, _, dim = query_BxNxSxD.shape
    key_heads = key_BxKxSxD.shape[1]
    group = heads // key_heads
    together = map.blocks.heads_of(group)
    parts = group // together
    queries, keys = map.blocks.query, map.blocks.key

    def heads_at(b, k, step, part, count):
        # Behind the last visit the last heads stay, and with them their blocks.
        return k * parts + jnp.where(step < count[b], part, parts - 1)

    def of_query(b, k, step, part, query, key, count):
        return b, heads_at(b, k, step, part, count), query[b, step], 0

    def along_query(b, k, step, part, query, key, count):
        return b, heads_at(b, k, step, part, count), 0, query[b, step]

    def of_key(b, k, step, part, query, key, count):
        return b, k, key[b, step], 0

    operands = [
        *map.by_key, query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, place_Bx2x1xS,
        logsumexp_BxNx1xS, dmixed_BxNxSxD, delta_BxNx1xS,
    ]  # fmt: skip
    out_shape = [struct(array.shape, array.dtype, array) for array in (key_BxKxSxD, value_BxKxSxD)]
    return pl.pallas_call(
        functools.partial(_key_value_kernel, rule=rule, parts=parts),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch, key_heads, map.by_key.count.max(), parts),
            in_specs=[
                pl.BlockSpec((None, together, queries, dim), of_query),
                pl.BlockSpec((None, None, keys, dim), of_key),
                pl.BlockSpec((None, None, keys, dim), of_key),
                pl.BlockSpec(
                    (None, 2, 1, queries), lambda b, k, step, part, query, key, count: (b, 0, 0, query[b, step])
                ),
                pl.BlockSpec((None, 2, 1, keys), lambda b, k, step, part, query, key, count: (b, 0, 0, key[b, step])),
                pl.BlockSpec((None, together, 1, queries), along_query),
                pl.BlockSpec((None, together, queries, dim), of_query),
                pl.BlockSpec((None, together, 1, queries), along_query),
            ],
            out_specs=[pl.BlockSpec((None, None, keys, dim), of_key)] * 2,
            scratch_shapes=[pltpu.VMEM((keys, dim), jnp.float32)] * 2,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=cost(4, query_BxNxSxD, map, rule, operands + out_shape),
        name="tree_attention_backward_dkv",
        interpret=interpret,
    )(*operands)


def _key_value_kernel(
    visit_query, visit_key, count, query_ref, key_ref, value_ref, place_query_ref, place_key_ref,
    logsumexp_ref, dmixed_ref, delta_ref, dkey_ref, dvalue_ref, dkey_sum_ref, dvalue_sum_ref, *, rule: Rule, parts: int,
):  # fmt: skip
    at = visit(visit_query, visit_key, count, visit_key, pl.program_id(0), pl.program_id(2))
    part = pl.program_id(3)

    @pl.when(at.first & (part == 0))
    def _():
        dkey_sum_ref[...] = jnp.zeros_like(dkey_sum_ref)
        dvalue_sum_ref[...] = jnp.zeros_like(dvalue_sum_ref)

    @pl.when(at.live)
    def _():
        key_CxD, value_CxD = key_ref[...], value_ref[...]
        visible_CxQ = visibility(place_query_ref[...], place_key_ref[...], at, rule, down="key")
        for head in range(query_ref.shape[0]):
            query_QxD, dmixed_QxD = query_ref[head], dmixed_ref[head]
            score_CxQ, slope_CxQ = scores(key_CxD, query_QxD, visible_CxQ, rule)
            weight_CxQ = jnp.exp(score_CxQ - logsumexp_ref[head])
            dvalue_sum_ref[...] += dot(weight_CxQ.astype(dmixed_QxD.dtype), dmixed_QxD, (1, 0))
            dweight_CxQ = dot(value_CxD, dmixed_QxD, (1, 1))
            dscore_CxQ = _dscore(weight_CxQ, slope_CxQ, dweight_CxQ, delta_ref[head])
            dkey_sum_ref[...] += dot(dscore_CxQ.astype(query_QxD.dtype), query_QxD, (1, 0))

    @pl.when(at.last & (part == parts - 1))
    def _():
        dkey_ref[...] = (rule.scale * dkey_sum_ref[...]).astype(dkey_ref.dtype)
        dvalue_ref[...] = dvalue_sum_ref[...].astype(dvalue_ref.dtype)


def _dscore(weight, slope, dweight, delta) -> jax.Array:
    """Returns the gradient of the scores before the soft-cap, still to be multiplied by `scale`; either way up."""
    dscore = weight * (dweight - delta)
    return dscore if slope is None else dscore * slope
