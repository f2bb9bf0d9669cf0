"""Drawing a token: by the distribution, and the same token from logits that differ by rounding."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_backtrack.sampling.logits import sample

VOCAB = 600  # blocks of 256, the last one not full


def test_tokens_come_as_often_as_they_are_likely():
    rows = 200_000
    logits_V = jnp.asarray(np.random.default_rng(0).normal(0, 2, VOCAB), jnp.float32)
    uniform_Bx2 = jax.random.uniform(jax.random.key(1), (rows, 2))
    drawn_B = jax.jit(lambda numbers: sample(jnp.broadcast_to(logits_V, (len(numbers), VOCAB)), numbers))(uniform_Bx2)
    share_V = np.bincount(drawn_B, minlength=VOCAB) / rows
    chance_V = np.asarray(jax.nn.softmax(logits_V))
    deviation_V = (share_V - chance_V) / np.sqrt(chance_V * (1 - chance_V) / rows)
    assert np.abs(deviation_V).max() < 4.5 and np.abs(np.mean(deviation_V**2) - 1) < 0.2


def test_masked_tokens_are_never_drawn():
    logits_BxV = jnp.full((5, VOCAB), -jnp.inf).at[:, 599].set(0.0)
    numbers = jnp.array([[0.0, 0.0], [0.999_999_94, 0.999_999_94], [0.5, 0.0], [0.0, 0.999_999_94], [0.3, 0.7]])
    assert sample(logits_BxV, numbers).tolist() == [599] * 5


def test_rounding_of_logits_hardly_ever_decides():
    """Most of the mass lies with tokens of which each has less than a millionth, as a vocabulary's tail has at high
    temperatures. The differences are those between a batch of one and one of sixteen."""
    rng, rows, vocabulary = np.random.default_rng(2), 1_000, 49_152
    logits_BxV = rng.normal(0, 1, (1, vocabulary)).astype(np.float32) + np.zeros((rows, 1), np.float32)
    rounded_BxV = logits_BxV + rng.normal(0, 3e-6, logits_BxV.shape).astype(np.float32)
    uniform_Bx2 = jax.random.uniform(jax.random.key(3), (rows, 2))
    one_B, other_B = (np.asarray(sample(jnp.asarray(logits), uniform_Bx2)) for logits in (logits_BxV, rounded_BxV))
    assert (one_B != other_B).sum() <= 2
