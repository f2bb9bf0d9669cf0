"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split layout of Hugging Face weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """How Llama-3.1 and later stretch the embedding to longer texts. Field names are those of Hugging Face.

    Waves longer than `original_max_position_embeddings / low_freq_factor` tokens are slowed down by `factor`, waves
    shorter than `original_max_position_embeddings / high_freq_factor` are left alone, those between go over smoothly.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_factors(cls, factor_D: np.ndarray, frequency_D: np.ndarray) -> "Llama3Scaling | None":
        """Finds the scaling that divides these frequencies by these factors, as .gguf files have it; None if none does.

        Only ratios of the last three fields are determined. Llama-3.1 to 3.3 have 1 and 4 in the first two of them.
        """
        factor, low, high = float(factor_D.max()), 1.0, 4.0
        waves_D = 2 * math.pi / frequency_D.astype(np.float64)
        between_D = (factor_D > 1 + 1e-4) & (factor_D < factor * (1 - 1e-4))
        if not (factor_D >= 1).all() or factor == 1:
            return None
        if between_D.any():
            kept_D = (1 / factor_D[between_D].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
            original = round(float(np.median(waves_D[between_D] * (low + kept_D * (high - low)))))
        else:  # any length between the two does the same
            least = high * waves_D[factor_D < factor].max(initial=0)
            original = 8192 if least <= 8192 <= low * waves_D[factor_D >= factor].min() else math.ceil(least)
        scaling = cls(factor, low, high, max(1, original))
        fits = np.allclose(scaling.apply(frequency_D), frequency_D / factor_D, rtol=1e-5, atol=0)
        return scaling if fits else None

    def apply(self, frequency_D: np.ndarray) -> np.ndarray:
        """Returns scaled frequencies, in radians per token as they come."""
        waves_D = self.original_max_position_embeddings * frequency_D / (2 * math.pi)  # in the original context
        kept_D = (waves_D - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept_D = np.clip(kept_D, 0, 1)
        return (kept_D + (1 - kept_D) / self.factor) * frequency_D


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """Radians per token of each pair of features, float32 `[D / 2]`."""
    frequency_D = 1 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    return (scaling.apply(frequency_D) if scaling else frequency_D).astype(np.float32)


def rope_angles(position_BxT: jax.Array, frequency_D: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of every position's angles, float32 `[B, T, 1, D / 2]`: one axis to broadcast over
    heads."""
    angle_BxTx1xD = position_BxT[..., None, None].astype(jnp.float32) * frequency_D
    return jnp.cos(angle_BxTx1xD), jnp.sin(angle_BxTx1xD)


def rotate(x_BxTxHxD: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair (i, i + D / 2) of every head by its position's angle, in float32; returns x's dtype."""
    cosine, sine = angles
    first, second = jnp.split(x_BxTxHxD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BxTxHxD.dtype)
