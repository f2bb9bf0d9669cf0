"""From logits to a token per row: penalty, bias, cuts and one random number. Nothing here sorts the vocabulary."""

import jax
import jax.numpy as jnp

# The vocabulary is drawn from in two steps: a block of so many tokens, then a token of it.
_BLOCK = 256


def penalise(logits_BxV: jax.Array, seen_BxV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Makes the tokens that stand in a row's context less likely (CTRL, Keskar et al. 2019, arXiv 1909.05858, 4.1).

    As in transformers, a negative logit is multiplied by the penalty and any other divided.
    """
    penalised_BxV = jnp.where(logits_BxV < 0, logits_BxV * penalty, logits_BxV / penalty)
    return jnp.where(seen_BxV, penalised_BxV, logits_BxV)


def keep_top_k(logits_BxV: jax.Array, k: int) -> jax.Array:
    """Leaves the `k` likeliest tokens of each row, and those as likely as the last of them."""
    return _from(logits_BxV, jax.lax.top_k(logits_BxV, k)[0][:, -1])


def keep_top_p(logits_BxV: jax.Array, p: jax.Array) -> jax.Array:
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


def keep_min_p(logits_BxV: jax.Array, p: jax.Array) -> jax.Array:
    """Leaves tokens of at least `p` times the likeliest one's probability (Nguyen et al. 2024, arXiv 2407.01082)."""
    return _from(logits_BxV, jnp.max(logits_BxV, axis=-1) + jnp.log(p))


def draw(logits_BxV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token at which each row's cumulative distribution passes `uniform` in `[0, 1)`, int32 `[B]`.

    One random number a row: Gumbel noise needs one for each token of the vocabulary, which on a CPU takes longer than
    the model does. The sum goes over blocks first and over the tokens of one block then.
    """
    rows, vocabulary = logits_BxV.shape
    weight_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
    weight_BxNxT = jnp.pad(weight_BxV, ((0, 0), (0, -vocabulary % _BLOCK))).reshape(rows, -1, _BLOCK)
    up_to_BxN = jnp.cumsum(weight_BxNxT.sum(axis=-1), axis=-1)
    target_B = uniform_B * up_to_BxN[:, -1]
    block_B, before_B = _passes(up_to_BxN, target_B)
    block_BxT = jnp.take_along_axis(weight_BxNxT, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = _passes(jnp.cumsum(block_BxT, axis=-1), target_B - before_B)
    return (block_B * _BLOCK + token_B).astype(jnp.int32)


def _passes(up_to_BxN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry that exceeds the target, or where rounding has left none the last that adds anything; and what
    the sum was before it."""
    exceeds_BxN = up_to_BxN > jnp.minimum(target_B, jnp.nextafter(up_to_BxN[:, -1], -jnp.inf))[:, None]
    first_B = jnp.argmax(exceeds_BxN, axis=-1)
    before_BxN = jnp.pad(up_to_BxN[:, :-1], ((0, 0), (1, 0)))
    return first_B, jnp.take_along_axis(before_BxN, first_B[:, None], axis=-1)[:, 0]


def _from(logits_BxV: jax.Array, least_B: jax.Array) -> jax.Array:
    return jnp.where(logits_BxV < least_B[:, None], -jnp.inf, logits_BxV)


def _rank(logits_BxV: jax.Array) -> jax.Array:
    """uint32 `[B, V]` in the order of the logits: floats are ordered by their bits, negative ones backwards."""
    bits_BxV = jax.lax.bitcast_convert_type(logits_BxV.astype(jnp.float32), jnp.uint32)
    is_negative_BxV = bits_BxV >> 31 == 1
    return jnp.where(is_negative_BxV, ~bits_BxV, bits_BxV | jnp.uint32(1 << 31))
