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
    weight_BxKxTxGxS = _weights(score_BxKxTxGxS, visible_BxTxS, scale, softcap).astype(value_BxSxKxD.dtype)
    mixed_BxTxKxGxD = jnp.einsum("bktgs,bskd->btkgd", weight_BxKxTxGxS, value_BxSxKxD)
    return mixed_BxTxKxGxD.reshape(batch, queries, heads, dim)


def attend_to_cache(
    query_BxTxNxD: jax.Array,
    key: jax.Array,
    value_BxKxSxD: jax.Array,
    visible_BxTxS: jax.Array,
    *,
    slots_last: bool,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """`attend` to keys and values as a cache has them, `[B, T, N, D]`: read as they lie, never transposed.

    `key` is `[B, K, S, D]`, with `slots_last` `[B, K, D, S]`.
    """
    batch, queries, heads, dim = query_BxTxNxD.shape
    grouped_BxTxKxGxD = query_BxTxNxD.reshape(batch, queries, value_BxKxSxD.shape[1], -1, dim)
    if slots_last and queries > 1:
        score_BxKxTxGxS = jnp.einsum("btkgd,bkds->bktgs", grouped_BxTxKxGxD, key, preferred_element_type=jnp.float32)
    elif slots_last:
        score_BxKxTxGxS = _sum_over_features(grouped_BxTxKxGxD.swapaxes(1, 2), key)
    else:
        score_BxKxTxGxS = jnp.einsum("btkgd,bksd->bktgs", grouped_BxTxKxGxD, key, preferred_element_type=jnp.float32)
    weight_BxKxTxGxS = _weights(score_BxKxTxGxS, visible_BxTxS, scale, softcap).astype(value_BxKxSxD.dtype)
    mixed_BxTxKxGxD = jnp.einsum("bktgs,bksd->btkgd", weight_BxKxTxGxS, value_BxKxSxD)
    return mixed_BxTxKxGxD.reshape(batch, queries, heads, dim)


def _sum_over_features(query_BxKxTxGxD: jax.Array, key_BxKxDxS: jax.Array) -> jax.Array:
    """Scores of a single token as one element-wise sum, which XLA's CPU backend runs in vectors and on all threads.

    As a matrix product it would be a call for each row and head, several times slower in a batch.
    """
    score_BxKxTxGxS = jnp.zeros((), jnp.float32)
    for feature in range(key_BxKxDxS.shape[2]):
        one_BxKxTxGx1 = query_BxKxTxGxD[..., feature, None].astype(jnp.float32)
        score_BxKxTxGxS += one_BxKxTxGx1 * key_BxKxDxS[:, :, None, None, feature].astype(jnp.float32)
    return score_BxKxTxGxS


def _weights(score_BxKxTxGxS, visible_BxTxS, scale, softcap) -> jax.Array:
    score_BxKxTxGxS *= scale
    if softcap is not None:
        score_BxKxTxGxS = soft_cap(score_BxKxTxGxS, softcap)
    score_BxKxTxGxS = jnp.where(visible_BxTxS[:, None, :, None], score_BxKxTxGxS, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(score_BxKxTxGxS, axis=-1)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Bends `x` smoothly into `-cap..cap`."""
    return cap * jnp.tanh(x / cap)
