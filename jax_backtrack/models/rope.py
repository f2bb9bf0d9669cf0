"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Hugging Face weights."""

import jax
import jax.numpy as jnp


def rope_angles(position_BxT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles, float32 `[B, T, 1, D / 2]`: one axis to broadcast over heads."""
    frequency_D = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_BxTx1xD = position_BxT[..., None, None].astype(jnp.float32) * frequency_D
    return jnp.cos(angle_BxTx1xD), jnp.sin(angle_BxTx1xD)


def rotate(x_BxTxHxD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (i, i + D / 2) of every head by its position's angle, in float32; returns x's dtype."""
    cosine, sine = angles
    first, second = jnp.split(x_BxTxHxD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BxTxHxD.dtype)
