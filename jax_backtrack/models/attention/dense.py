"""Dense attention with grouped heads: the reference, and what a cache is attended to with."""

import functools

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
    """Attends by softmax, `[B, T, N, D]`; `N` is a multiple of `K` and keys are never repeated.

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
    key_BxKxSxD: jax.Array,
    value_BxKxSxD: jax.Array,
    visible_BxTxS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attends, as `attend` does, to keys and values as a cache has them, `[B, T, N, D]`: they are never transposed."""
    grouped_BxKxTxGxD, visible_BxQxS = _by_kv_head(query_BxTxNxD, visible_BxTxS, value_BxKxSxD.shape[1])
    query_BxKxQxD = grouped_BxKxTxGxD.reshape(*grouped_BxKxTxGxD.shape[:2], -1, query_BxTxNxD.shape[-1])
    score_BxKxQxS = jnp.einsum("bkqd,bksd->bkqs", query_BxKxQxD, key_BxKxSxD, preferred_element_type=jnp.float32)
    weight_BxKxQxS = _weights(score_BxKxQxS, visible_BxQxS[:, None], scale, softcap).astype(value_BxKxSxD.dtype)
    mixed_BxKxQxD = jnp.matmul(weight_BxKxQxS, value_BxKxSxD)
    return mixed_BxKxQxD.reshape(grouped_BxKxTxGxD.shape).swapaxes(1, 2).reshape(query_BxTxNxD.shape)


def attend_to_matrices(
    query_BxTxNxD: jax.Array,
    key_RxDxS: jax.Array,
    value_RxSxD: jax.Array,
    visible_BxTxS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attends as `attend_to_cache` does, for a cache whose rows and heads are one axis, `R = B * K`, with keys turned
    round."""
    batch = len(query_BxTxNxD)
    grouped_BxKxTxGxD, visible_BxQxS = _by_kv_head(query_BxTxNxD, visible_BxTxS, len(value_RxSxD) // batch)
    query_RxQxD = grouped_BxKxTxGxD.reshape(len(value_RxSxD), -1, query_BxTxNxD.shape[-1])
    score_RxQxS = jnp.einsum("rqd,rds->rqs", query_RxQxD, key_RxDxS, preferred_element_type=jnp.float32)
    score_BxKxQxS = score_RxQxS.reshape(batch, -1, *score_RxQxS.shape[1:])
    weight_BxKxQxS = _weights(score_BxKxQxS, visible_BxQxS[:, None], scale, softcap).astype(value_RxSxD.dtype)
    mixed_RxQxD = jnp.matmul(weight_BxKxQxS.reshape(score_RxQxS.shape), value_RxSxD)
    return mixed_RxQxD.reshape(grouped_BxKxTxGxD.shape).swapaxes(1, 2).reshape(query_BxTxNxD.shape)


def _by_kv_head(query_BxTxNxD, visible_BxTxS, kv_heads: int) -> tuple[jax.Array, jax.Array]:
    """Returns queries `[B, K, T, G, D]` by key-value head, and what each sees, `[B, Q, S]`.

    Queries of a key-value head become one axis, Q, so that each product is a plain batch of matrices: XLA's CPU backend
    takes several times as long where an axis of length one stands between.
    """
    batch, queries, heads, dim = query_BxTxNxD.shape
    grouped_BxKxTxGxD = query_BxTxNxD.reshape(batch, queries, kv_heads, -1, dim).swapaxes(1, 2)
    return grouped_BxKxTxGxD, jnp.repeat(visible_BxTxS, heads // kv_heads, axis=1)


def attend_behind(
    query_BxTxNxD: jax.Array,
    key_BxTxKxD: jax.Array,
    value_BxTxKxD: jax.Array,
    read_key_CxKxSxD: jax.Array,
    read_value_CxKxSxD: jax.Array,
    visible_TxS: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Attends in rows that go on after the same tokens, of which `read_key` and `read_value` are, `[B, T, N, D]`.

    There are `C` copies, one for `B / C` rows each. All queries of these rows meet a copy in one product; it is never
    repeated for a row. `visible`, the same for all rows, is first of the `S` read tokens, then of the row's own `T`.
    """
    rows, queries, _, dim = query_BxTxNxD.shape
    copies, kv_heads, slots, _ = read_key_CxKxSxD.shape
    query_KxBxTxGxD = jnp.moveaxis(query_BxTxNxD.reshape(rows, queries, kv_heads, -1, dim), 2, 0)
    grouped = query_KxBxTxGxD.shape[:-1]
    by_copy, by_row = (kv_heads, copies, -1), (kv_heads, rows, -1)
    products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    of_read = products("kcqd,cksd->kcqs", query_KxBxTxGxD.reshape(*by_copy, dim), read_key_CxKxSxD)
    of_own = products("kbqd,bskd->kbqs", query_KxBxTxGxD.reshape(*by_row, dim), key_BxTxKxD)
    score_KxBxTxGxS = jnp.concatenate([of_read.reshape(*grouped, slots), of_own.reshape(*grouped, queries)], axis=-1)
    weight_KxBxTxGxS = _weights(score_KxBxTxGxS, visible_TxS[:, None], scale, softcap).astype(value_BxTxKxD.dtype)
    to_read, to_own = jnp.split(weight_KxBxTxGxS, [slots], axis=-1)
    mixed = products("kcqs,cksd->kcqd", to_read.reshape(*by_copy, slots), read_value_CxKxSxD).reshape(*grouped, dim)
    mixed += products("kbqs,bskd->kbqd", to_own.reshape(*by_row, queries), value_BxTxKxD).reshape(*grouped, dim)
    return jnp.moveaxis(mixed, 0, 2).reshape(query_BxTxNxD.shape).astype(query_BxTxNxD.dtype)


def _weights(score, visible, scale, softcap) -> jax.Array:
    """Returns the softmax of scores along the last axis; `visible` has their shape, or length one if all are alike."""
    score *= scale
    if softcap is not None:
        score = soft_cap(score, softcap)
    return jax.nn.softmax(jnp.where(visible, score, jnp.finfo(jnp.float32).min), axis=-1)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Bends `x` smoothly into `-cap..cap`."""
    return cap * jnp.tanh(x / cap)
