"""Losses: pure functions of the tokens' log-probabilities, `log p(token | path to its parent)`, `[B, S]` float32."""

import jax
import jax.numpy as jnp

from jax_backtrack.backtracking.trees import NO_PAIR


def sft_loss(logprob_BxS: jax.Array, loss_weights_BxS: jax.Array, total_weight: jax.Array | None = None) -> jax.Array:
    """Returns the mean negative log-probability of the weighted tokens, `-sum(weight * logprob) / sum(weight)`; in nats
    per token.

    `total_weight` is that of the whole batch where these rows are a part of it; the losses of the parts add up.
    """
    total_weight = jnp.sum(loss_weights_BxS) if total_weight is None else total_weight
    return -jnp.sum(loss_weights_BxS * logprob_BxS) / total_weight


def pair_slots(pair_id_BxS: jax.Array, loss_weights_BxS: jax.Array) -> jax.Array:
    """Returns bool `[B, S]`: slot `p` of a row is the number of one of its preference pairs."""

    def one_row(pair_id_S, loss_weights_S):
        return jnp.zeros(pair_id_S.shape, bool).at[_slots(pair_id_S)].max(loss_weights_S != 0)

    return jax.vmap(one_row)(pair_id_BxS, loss_weights_BxS)


def pair_margins(logprob_BxS: jax.Array, pair_id_BxS: jax.Array, loss_weights_BxS: jax.Array) -> jax.Array:
    """Returns the margin of every preference pair: log-probability of the chosen side less that of the rejected one, in
    nats.

    float32 `[B, S]`, with pair `p` of a row in slot `p`; `pair_slots` says which slots hold one. What both sides share
    (prompt and prefix) has weight 0: it would cancel.
    """

    def one_row(logprob_S, pair_id_S, loss_weights_S):
        return jnp.zeros_like(logprob_S).at[_slots(pair_id_S)].add(loss_weights_S * logprob_S)

    return jax.vmap(one_row)(logprob_BxS, pair_id_BxS, loss_weights_BxS)


def _slots(pair_id_S: jax.Array) -> jax.Array:
    return jnp.where(pair_id_S == NO_PAIR, 0, pair_id_S)


def pair_logps(logprob_BxS: jax.Array, pair_id_BxS: jax.Array, loss_weights_BxS: jax.Array) -> jax.Array:
    """Returns the log-probabilities of the chosen and of the rejected side of every preference pair, in nats: float32
    `[B, S, 2]`.

    They stand where `pair_margins` has the pair's margin, which is their difference.
    """
    chosen_BxS = pair_margins(logprob_BxS, pair_id_BxS, jnp.maximum(loss_weights_BxS, 0))
    rejected_BxS = pair_margins(logprob_BxS, pair_id_BxS, jnp.maximum(-loss_weights_BxS, 0))
    return jnp.stack([chosen_BxS, rejected_BxS], axis=-1)


def dpo_loss(
    logps: jax.Array,
    reference_logps: jax.Array,
    is_pair: jax.Array,
    beta: float,
    total_pairs: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes direct preference optimisation, `-log sigmoid(reward of chosen - reward of rejected)`, mean over the
    pairs.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. The reward of a side is `beta * (its log-probability
    - the reference's)`. `logps` and `reference_logps` are as `pair_logps` gives them, `[..., 2]`; slots where
    `is_pair`, `[...]`, is False do not count. Returns the scalar loss and scalars by the names that TRL's DPOTrainer
    has for them: means over the pairs of rewards (`rewards/chosen`, `rewards/rejected`, `rewards/margins`) and of
    log-probabilities (`logps/chosen`, `logps/rejected`), and the share of pairs whose chosen side has the larger reward
    (`rewards/accuracies`). `total_pairs` is that of the whole batch where these rows are a part of it; what the parts
    return adds up.
    """
    reward = jnp.where(is_pair[..., None], beta * (logps - reference_logps), 0.0)
    margin = reward[..., 0] - reward[..., 1]
    pairs = jnp.sum(is_pair) if total_pairs is None else total_pairs

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_pair, x, 0.0)) / pairs

    metrics = {
        "rewards/chosen": mean(reward[..., 0]),
        "rewards/rejected": mean(reward[..., 1]),
        "rewards/margins": mean(margin),
        "rewards/accuracies": mean(margin > 0),
        "logps/chosen": mean(logps[..., 0]),
        "logps/rejected": mean(logps[..., 1]),
    }
    return mean(-jax.nn.log_sigmoid(margin)), metrics
