"""A fingerprint of parameters, computed where they lie: the same on one device and on many, and nothing is gathered."""

import hashlib

import jax
import jax.numpy as jnp
from flax import nnx

_LANES = (0x9E3779B9, 0x85EBCA6B)  # seeds of two 32-bit sums, which together make 64 bits


def checksum(params: nnx.State) -> str:
    """A hash of names, shapes, dtypes and bits of the parameters; depends on where each element stands.

    Every process of a run must call this; each gets the same. It finds any change of one element, and other changes,
    such as two elements or two layers exchanged, unless 64 bits agree by chance. It is no defence against intent.
    """
    flat = nnx.to_flat_state(params)
    sums = jax.device_get(_sums([param[...] for _, param in flat]))
    digest = hashlib.blake2b(digest_size=16)
    for (path, param), lanes in zip(flat, sums, strict=True):
        digest.update(f"{path} {param.shape} {param.dtype} {[int(lane) for lane in lanes]}\n".encode())
    return digest.hexdigest()


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[tuple[jax.Array, ...]]:
    return [tuple(_lane(array, seed) for seed in _LANES) for array in arrays]


def _lane(array: jax.Array, seed: int) -> jax.Array:
    """Sum over all elements of a mixture of bits and place, uint32. Such sums wrap, so their order does not matter."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    for axis, size in enumerate(array.shape):
        # Places are mixed axis by axis, in vectors: cheap, and no place needs a number beyond 32 bits.
        place = _mix(jnp.arange(size, dtype=jnp.uint32) + jnp.uint32((seed * (2 * axis + 3)) % 2**32))
        bits = bits + place.reshape((size,) + (1,) * (array.ndim - axis - 1))
    return jnp.sum(_mix(bits), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Spreads every bit over the word, one to one (the finalizer of MurmurHash3, by Austin Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
