"""Flash attention for rows of token trees, forward and backward, on TPU.

    attend(q, k)  =  k <= q  and  q < end[k]  and  position[q] - position[k] < window

Blocks in which no query may attend to any key are neither computed nor fetched: causal ones, other trees of the row,
and other branches of the tree. What is computed is exactly `models.attention.attend` under `trees.tree_attention_mask`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from jax_backtrack.errors import InputError
from jax_backtrack.models.attention.pallas.backward import backward_key_value, backward_query
from jax_backtrack.models.attention.pallas.block_map import BlockMap, BlockSizes, block_map, visible_blocks
from jax_backtrack.models.attention.pallas.forward import forward
from jax_backtrack.models.attention.pallas.scores import Rule

__all__ = ["RESIDUALS", "BlockMap", "BlockSizes", "block_map", "tree_attention", "visible_blocks"]

RESIDUALS = "tree_attention"  # checkpoint name of what the backward pass needs of the forward pass


def tree_attention(
    query_BxSxNxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    position_BxS: jax.Array,
    end_BxS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    blocks: BlockSizes = BlockSizes(),
    map: BlockMap | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Attends from every token to its ancestors and itself, `[B, S, N, D]` in the query's dtype.

    query, key, value: bfloat16 or float32. `N` is a multiple of `K`; keys and values are not repeated. Scores, softmax
    and sums are float32; the products of float32 inputs are taken at full precision.
    position, end: int32, as in `trees.TokenTrees`; every token sees itself (`end > index`, `window >= 1`).
    scale, softcap: scores are `scale * q.k`, then with `softcap` bent into `-softcap..softcap`.
    map: `block_map(position, end, window, blocks)`, where it has been made before; made here by default.
    interpret: run on any backend, slowly, for tests; with InterpretParams as a TPU's memories would have it. Under
    `jax.shard_map` this needs `check_vma=False`; a TPU does not.

    Differentiable once in query, key and value. Where layers are recomputed, the policy
    `jax.checkpoint_policies.save_only_these_names(RESIDUALS)` keeps the output and one float per query and head, and
    with them the backward pass does without a second run of the forward kernel.

    InputError where shapes or block sizes do not fit.
    """
    _check(query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, end_BxS, window)
    length = query_BxSxNxD.shape[1]
    blocks = blocks.fit(length)
    if not interpret:
        blocks.check_lanes(length)
    if map is None:
        map = block_map(position_BxS, end_BxS, window, blocks)
    elif (map.window, map.blocks) != (window, blocks):
        raise InputError(
            f"the block map was made for window {map.window} and {map.blocks}, attention runs with window {window} and "
            f"{blocks}: make one map per window and block size"
        )
    place_Bx2x1xS = jnp.stack([end_BxS, position_BxS], axis=1)[:, :, None, :].astype(jnp.int32)
    heads_first = [jnp.swapaxes(array, 1, 2) for array in (query_BxSxNxD, key_BxSxKxD, value_BxSxKxD)]
    mixed_BxNxSxD = _attention(Rule(scale, softcap, window), interpret, *heads_first, place_Bx2x1xS, map)
    return jnp.swapaxes(mixed_BxNxSxD, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(rule, interpret, query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, map):
    return forward(query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, map, rule, interpret)[0]


def _attention_forward(rule, interpret, query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS, map):
    operands = query_BxNxSxD, key_BxKxSxD, value_BxKxSxD, place_Bx2x1xS
    mixed_BxNxSxD, logsumexp_BxNx1xS = forward(*operands, map, rule, interpret)
    mixed_BxNxSxD, logsumexp_BxNx1xS = (checkpoint_name(x, RESIDUALS) for x in (mixed_BxNxSxD, logsumexp_BxNx1xS))
    return mixed_BxNxSxD, (operands, map, mixed_BxNxSxD, logsumexp_BxNx1xS)


def _attention_backward(rule, interpret, residuals, dmixed_BxNxSxD):
    operands, map, mixed_BxNxSxD, logsumexp_BxNx1xS = residuals
    delta_BxNxS = jnp.sum(mixed_BxNxSxD.astype(jnp.float32) * dmixed_BxNxSxD.astype(jnp.float32), axis=-1)
    operands = *operands, logsumexp_BxNx1xS, dmixed_BxNxSxD, delta_BxNxS[:, :, None, :]
    dquery_BxNxSxD = backward_query(*operands, map, rule, interpret)
    dkey_BxKxSxD, dvalue_BxKxSxD = backward_key_value(*operands, map, rule, interpret)
    return dquery_BxNxSxD, dkey_BxKxSxD, dvalue_BxKxSxD, None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _check(query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, end_BxS, window) -> None:
    batch, length, heads, dim = query_BxSxNxD.shape
    key_heads = key_BxSxKxD.shape[2]
    if key_BxSxKxD.shape != (batch, length, key_heads, dim) or value_BxSxKxD.shape != key_BxSxKxD.shape:
        raise InputError(
            f"queries {query_BxSxNxD.shape}, keys {key_BxSxKxD.shape} and values {value_BxSxKxD.shape} do not belong "
            "together: want [B, S, N, D] and twice [B, S, K, D]"
        )
    if heads % key_heads:
        raise InputError(f"{heads} query heads cannot share {key_heads} key heads evenly: want a multiple of them")
    if end_BxS.shape != (batch, length):
        raise InputError(f"end and position have shape {end_BxS.shape}, the queries are {(batch, length)} tokens")
    if window is not None and window < 1:
        raise InputError(f"a window of {window} tokens: a token must see itself, so it is 1 or more, or None")
