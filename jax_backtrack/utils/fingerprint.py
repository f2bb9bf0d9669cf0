"""A fingerprint of arrays, computed where they lie: the same on one device and on many, and nothing is gathered."""

import functools
import hashlib

import jax
import jax.numpy as jnp

_LANES = (0x9E3779B9, 0x85EBCA6B)  # seeds of two 32-bit sums, which together make 64 bits


def fingerprint(tree) -> str:
    """Returns a hash of names, shapes, dtypes and bits of a tree's arrays; depends on where each element stands.

    Every process of a run must call this; each gets the same. It finds any change of one element, and other changes,
    such as two elements or two layers exchanged, unless 64 bits agree by chance. It is no defence against intent.
    """
    flat = [(jax.tree_util.keystr(path), array) for path, array in jax.tree_util.tree_leaves_with_path(tree)]
    layered = tuple("blocks" in path for path, _ in flat)
    sums = jax.device_get(_sums([array for _, array in flat], layered))
    digest = hashlib.blake2b(digest_size=16)
    for (path, array), lanes in zip(flat, sums, strict=True):
        digest.update(f"{path} {array.shape} {array.dtype} {[int(lane) for lane in lanes]}\n".encode())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames="layered")
def _sums(arrays: list[jax.Array], layered: tuple[bool, ...]) -> list[list[jax.Array]]:
    """Returns two sums of each array; layers, which are stacked along the first axis, are taken one at a time, to save
    memory.

    The layer's number goes into its seed.
    """
    lanes = [jnp.uint32(lane) for lane in _LANES]
    return [
        [(_sum_of_layers if stacked else _sum)(array, lane) for lane in lanes]
        for array, stacked in zip(arrays, layered, strict=True)
    ]


# Compiled into what calls it. Arrays of one shape, such as a parameter's and its moments', are traced once.
@jax.jit
def _sum_of_layers(array: jax.Array, seed: jax.Array) -> jax.Array:
    sums = jax.lax.map(lambda layer: _sum(*layer), (array, _places(len(array), seed)))
    return jnp.sum(sums, dtype=jnp.uint32)


@jax.jit
def _sum(array: jax.Array, seed: jax.Array) -> jax.Array:
    """Returns the sum over all elements of a mixture of bits and place, uint32. Such sums wrap, so their order does not
    matter."""
    mixed = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    for axis, size in enumerate(array.shape):
        # Places are mixed axis by axis, in vectors: cheap, and no place needs a number beyond 32 bits.
        mixed += _places(size, _mix(seed + axis)).reshape((size,) + (1,) * (array.ndim - axis - 1))
    return jnp.sum(_mix(mixed), dtype=jnp.uint32)


def _places(size: int, seed: jax.Array) -> jax.Array:
    """Returns a number for each place along an axis, uint32 `[size]`."""
    return _mix(jnp.arange(size, dtype=jnp.uint32) + seed)


def _mix(x: jax.Array) -> jax.Array:
    """Spreads every bit over the word, one to one (the finalizer of MurmurHash3, by Austin Appleby, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
