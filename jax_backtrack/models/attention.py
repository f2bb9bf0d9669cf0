"""Attention with grouped heads: dense, which is the reference and the path on CPU, or by the TPU kernel."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_backtrack.kernels.tree_attention import BlockMap, tree_attention
from jax_backtrack.sharding import partition


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
    score_BxKxGxTxS = scale * jnp.einsum(
        "btkgd,bskd->bkgts", grouped_BxTxKxGxD, key_BxSxKxD, preferred_element_type=jnp.float32
    )
    if softcap is not None:
        score_BxKxGxTxS = soft_cap(score_BxKxGxTxS, softcap)
    score_BxKxGxTxS = jnp.where(visible_BxTxS[:, None, None], score_BxKxGxTxS, jnp.finfo(jnp.float32).min)
    weight_BxKxGxTxS = jax.nn.softmax(score_BxKxGxTxS, axis=-1).astype(value_BxSxKxD.dtype)
    mixed_BxTxKxGxD = jnp.einsum("bkgts,bskd->btkgd", weight_BxKxGxTxS, value_BxSxKxD)
    return mixed_BxTxKxGxD.reshape(batch, queries, heads, dim)


def attend_by_kernel(
    query_BxSxNxD: jax.Array,
    key_BxSxKxD: jax.Array,
    value_BxSxKxD: jax.Array,
    position_BxS: jax.Array,
    end_BxS: jax.Array,
    map: BlockMap,
    *,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None,
) -> jax.Array:
    """`attend` under `trees.attention_rule`, each device for its own rows and heads; see `kernels.tree_attention`.

    On other devices than TPUs the kernel is interpreted, which is slow.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    interpret = device.platform != "tpu"
    kernel = functools.partial(
        tree_attention, scale=scale, softcap=softcap, window=map.window, blocks=map.blocks, interpret=interpret
    )

    def of_this_device(query, key, value, position, end, map):
        return kernel(query, key, value, position, end, map=map)

    operands = query_BxSxNxD, key_BxSxKxD, value_BxSxKxD, position_BxS, end_BxS, map
    if mesh is None or mesh.size == 1:
        return of_this_device(*operands)
    rows, queries, keys = (partition(axes, "computed") for axes in ("B", "BxSxNxD", "BxSxKxD"))
    in_specs = queries, keys, keys, rows, rows, rows
    # The interpreter's own operations do not say which mesh axes they vary along.
    check = not interpret
    return jax.shard_map(of_this_device, mesh=mesh, in_specs=in_specs, out_specs=queries, check_vma=check)(*operands)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """Bends `x` smoothly into `-cap..cap`."""
    return cap * jnp.tanh(x / cap)
