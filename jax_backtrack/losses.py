"""Losses: pure functions of token scores. A score is `log p(token | path to its parent)`, `[B, S]` float32."""

import jax
import jax.numpy as jnp

from jax_backtrack.trees import NO_PAIR


def sft_loss(score_BxS: jax.Array, weight_BxS: jax.Array) -> jax.Array:
    """Mean negative score of the scored tokens, `-sum(weight * score) / sum(weight)`; scalar, in nats per token."""
    return -jnp.sum(weight_BxS * score_BxS) / jnp.sum(weight_BxS)


def pair_margins(score_BxS: jax.Array, pair_BxS: jax.Array, weight_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Margin of every preference pair: summed score of the chosen side less that of the rejected side, in nats.

    Returns `margin_BxS`, with pair `p` of a row in slot `p`, and `is_pair_BxS`, which slots hold a pair. What both
    sides share (prompt and prefix) has weight 0: it would cancel.
    """

    def one_row(score_S, pair_S, weight_S):
        slot_S = jnp.where(pair_S == NO_PAIR, 0, pair_S)
        margin_S = jnp.zeros_like(score_S).at[slot_S].add(weight_S * score_S)
        is_pair_S = jnp.zeros(score_S.shape, bool).at[slot_S].max(weight_S != 0)
        return margin_S, is_pair_S

    return jax.vmap(one_row)(score_BxS, pair_BxS, weight_BxS)


def dpo_loss(
    margin: jax.Array, reference_margin: jax.Array, is_pair: jax.Array, beta: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Direct preference optimisation, `-log sigmoid(beta * (margin - reference_margin))`, mean over the pairs.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; the log-ratios of both sides stand here as one margin each.
    The three arrays have one shape; slots where `is_pair` is False do not count. Returns the scalar loss and scalars:
    `reward_margin` (mean of `beta * (margin - reference_margin)`) and `reward_accuracy` (share of pairs above 0).
    """
    reward_margin = jnp.where(is_pair, beta * (margin - reference_margin), 0.0)
    pairs = jnp.sum(is_pair)
    loss = jnp.sum(jnp.where(is_pair, -jax.nn.log_sigmoid(reward_margin), 0.0)) / pairs
    metrics = {
        "reward_margin": jnp.sum(reward_margin) / pairs,
        "reward_accuracy": jnp.sum(is_pair & (reward_margin > 0)) / pairs,
    }
    return loss, metrics
