"""Dense attention with grouped heads: the reference, and what a cache is attended to with."""

import jax
import jax.numpy as jnp


def attend(
    query_BxTxNxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    visible_BxTxS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention, `[B, T, N, D]`; `N` is a multiple of `K` and keys are never repeated.

    Scores and softmax are float32. Scores are multiplied by `scale` and then, with `softcap`, bent into
    `-softcap..softcap` (Gemma 2, arXiv 2408.00118, section 2). `visible` is False where a query must not look; a query
    that sees nothing gives the mean of all values, so callers keep at least the token itself visible.
    """
    batch, queries, heads, dim = query_BxTxNxD.shape
    grouped_BxTxKxGxD = query_BxTxNxD.reshape(batch, queries, key_BxSxKxD.shape[2], -1, dim)
    # T before G, as the product leaves them: scores are never transposed.
    score_BxKxTxGxS = jnp.einsum(
        "btkgd,bskd->bktgs", grouped_BxTxKxGxD, key_BxSxKxD, preferred_element_type=jnp.float32
    )
    weight_BxKxTxGxS = _weights(score_BxKxTxGxS, visible_BxTxS[:, None, :, None], scale, softcap).astype(
        value_BxSxKxD.dtype
    )
    mixed_BxTxKxGxD = jnp.einsum("bktgs,bskd->btkgd", weight_BxKxTxGxS, value_BxSxKxD)
    return mixed_BxTxKxGxD.reshape(batch, queries, heads, dim)


def attend_to_cache(
    query_BxTxNxD: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible_BxTxS: jax.Array,
    *,
    apart: bool,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """`attend` to keys and values as a cache has them, `[B, T, N, D]`: read as they lie, never transposed.

    `key` and `value` are `[B, K, S, D]`, where layers are apart `[B * K, D, S]` and `[B * K, S, D]`.
    """
    batch, queries, heads, dim = query_BxTxNxD.shape
    kv_heads = len(value) // batch if apart else value.shape[1]
    # Queries of a key-value head become one axis, Q, so that each product is a plain batch of matrices: XLA's CPU
    # backend takes several times as long where an axis of length one stands between.
    grouped_BxKxTxGxD = query_BxTxNxD.reshape(batch, queries, kv_heads, -1, dim).swapaxes(1, 2)
    visible_BxQxS = jnp.repeat(visible_BxTxS, heads // kv_heads, axis=1)
    if apart:
        query_RxQxD = grouped_BxKxTxGxD.reshape(batch * kv_heads, -1, dim)
        score = jnp.einsum("rqd,rds->rqs", query_RxQxD, key, preferred_element_type=jnp.float32)
    else:
        query_BxKxQxD = grouped_BxKxTxGxD.reshape(batch, kv_heads, -1, dim)
        score = jnp.einsum("bkqd,bksd->bkqs", query_BxKxQxD, key, preferred_element_type=jnp.float32)
    score_BxKxQxS = score.reshape(batch, kv_heads, *score.shape[-2:])
    weight_BxKxQxS = _weights(score_BxKxQxS, visible_BxQxS[:, None], scale, softcap).astype(value.dtype)
    mixed = jnp.matmul(weight_BxKxQxS.reshape(score.shape), value)
    return mixed.reshape(grouped_BxKxTxGxD.shape).swapaxes(1, 2).reshape(query_BxTxNxD.shape)


def _weights(score, visible, scale, softcap) -> jax.Array:
    """Softmax along the last axis of scores; `visible` has their shape, or length one where it is the same for all."""
    score *= scale
    if softcap is not None:
        score = soft_cap(score, softcap)
    return jax.nn.softmax(jnp.where(visible, score, jnp.finfo(jnp.float32).min), axis=-1)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Bends `x` smoothly into `-cap..cap`."""
    return cap * jnp.tanh(x / cap)
