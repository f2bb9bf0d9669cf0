"""From logits to a token per row: penalty, bias, cuts and two random numbers. Nothing here sorts the vocabulary."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# The vocabulary is drawn from in two steps: a block of so many tokens, then a token of it.
_BLOCK = 256


def without(logits_BxV: jax.Array, ids: Sequence[tuple[int, int]]) -> jax.Array:
    """Masks runs of ids, each given by its first one and the one behind its last."""
    id_V = jnp.arange(logits_BxV.shape[1])
    for first, behind in ids:
        logits_BxV = jnp.where((id_V >= first) & (id_V < behind), -jnp.inf, logits_BxV)
    return logits_BxV


def apply_repetition_penalty(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Makes the tokens that stand in a row's context less likely (CTRL, Keskar et al. 2019, arXiv 1909.05858, 4.1).

    As in transformers, a negative logit is multiplied by the penalty and any other divided.
    """
    penalised_BxV = jnp.where(logits_BxV < 0, logits_BxV * penalty, logits_BxV / penalty)
    return jnp.where(seen_BxV, penalised_BxV, logits_BxV)


def top_k_mask(logits_BxV: jax.Array, k: int) -> jax.Array:
    """Leaves the `k` likeliest tokens of each row, and those as likely as the last of them."""
    return _from(logits_BxV, jax.lax.top_k(logits_BxV, k)[0][:, -1])


def top_p_mask(logits_BxV: jax.Array, p: jax.Array) -> jax.Array:
    """Leaves the likeliest tokens that together have the probability `p` (Holtzman et al. 2020, arXiv 1904.09751).

    The least of them is found by halving: 32 sums over the vocabulary decide the 32 bits of its logit, one by one.
    """
    mass_BxV = jax.nn.softmax(logits_BxV, axis=-1)
    rank_BxV = _rank(logits_BxV)

    def decide(bit, least_B):
        higher_B = least_B | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        enough_B = jnp.sum(jnp.where(rank_BxV >= higher_B[:, None], mass_BxV, 0), axis=-1) >= p
        return jnp.where(enough_B, higher_B, least_B)

    least_B = jax.lax.fori_loop(0, 32, decide, jnp.zeros(len(logits_BxV), jnp.uint32))
    return jnp.where(rank_BxV >= least_B[:, None], logits_BxV, -jnp.inf)


def min_p_mask(logits_BxV: jax.Array, p: jax.Array) -> jax.Array:
    """Leaves tokens of at least `p` times the likeliest one's probability (Nguyen et al. 2024, arXiv 2407.01082)."""
    return _from(logits_BxV, jnp.max(logits_BxV, axis=-1) + jnp.log(p))


def sample(logits_BxV: jax.Array, uniform_Bx2: jax.Array) -> jax.Array:
    """Draws a token for each row, int32 `[B]`, from two numbers in `[0, 1)`.

    The first one is where the cumulative distribution of blocks of tokens is passed, the second one the same within the
    block. With one number for both, an unlikely token would be decided by how its sum was rounded, and so differ from
    batch to batch: there are many of them, each with less probability than the rounding of what stands before it.
    Gumbel noise needs a number for each token of the vocabulary, which on a CPU takes longer than the model does.
    """
    rows, vocabulary = logits_BxV.shape
    weight_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
    weight_BxNxT = jnp.pad(weight_BxV, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(rows, -1, _BLOCK)
    block_B = _passed(weight_BxNxT.sum(axis=-1), uniform_Bx2[:, 0])
    block_BxT = jnp.take_along_axis(weight_BxNxT, block_B[:, None, None], axis=1)[:, 0]
    return (block_B * _BLOCK + _passed(block_BxT, uniform_Bx2[:, 1])).astype(jnp.int32)


def _passed(weight_BxN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Returns the first entry up to which more than `uniform` of the weight is summed, or where rounding has left none
    the last that adds anything."""
    up_to_BxN = jnp.cumsum(weight_BxN, axis=-1)
    all_B = up_to_BxN[:, -1]
    target_B = jnp.minimum(uniform_B * all_B, jnp.nextafter(all_B, -jnp.inf))
    return jnp.argmax(up_to_BxN > target_B[:, None], axis=-1)


def _from(logits_BxV: jax.Array, least_B: jax.Array) -> jax.Array:
    return jnp.where(logits_BxV < least_B[:, None], -jnp.inf, logits_BxV)


def _rank(logits_BxV: jax.Array) -> jax.Array:
    """Returns uint32 `[B, V]` in the order of the logits: floats are ordered by their bits, negative ones backwards."""
    bits_BxV = jax.lax.bitcast_convert_type(logits_BxV.astype(jnp.float32), jnp.uint32)
    is_negative_BxV = bits_BxV >> 31 == 1
    return jnp.where(is_negative_BxV, ~bits_BxV, bits_BxV | jnp.uint32(1 << 31))
