"""Log-probabilities of token trees: the vocabulary projection runs for scored tokens only, in chunks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_backtrack.backtracking.trees import TokenTrees
from jax_backtrack.distributed.mesh import shard


def token_logprobs(model, rows: TokenTrees, chunk: int = 128, added: jax.Array | None = None) -> jax.Array:
    """Returns `log p(token | path to its parent)`, `[B, S]` float32; 0 where a token's weight is 0.

    The scored tokens of each row come first in `ceil(S / chunk)` chunks of `[B, chunk]` tokens, and a chunk without
    scored tokens is skipped at run time (`Compute.skip_unscored`). Logits of one chunk at a time exist, in the backward
    pass too. `added` is as in `model.hidden`.
    """
    return _measure(model, rows, chunk, added, lambda logits_BxCxV, logprob_BxC: (logprob_BxC,))[0]


def logprobs_and_likeliest(model, rows: TokenTrees, chunk: int = 128) -> tuple[jax.Array, jax.Array]:
    """`token_logprobs`, and 1 in the place of every scored token that no other is likelier than, 0 elsewhere."""

    def measures(logits_BxCxV, logprob_BxC):
        largest_BxC = jnp.max(logits_BxCxV, axis=-1) - jax.nn.logsumexp(logits_BxCxV, axis=-1)
        return logprob_BxC, (logprob_BxC >= largest_BxC).astype(jnp.float32)

    return _measure(model, rows, chunk, None, measures)


def _measure(model, rows: TokenTrees, chunk: int, added: jax.Array | None, measures: Callable) -> tuple[jax.Array, ...]:
    """Returns what `measures(logits, logprobs)` gives of scored tokens, each `[B, S]` float32 and 0 for all other
    tokens."""
    mesh = model.compute.mesh
    hidden_BxSxM = model.hidden(rows.tokens, rows.position, rows.subtree_end, added)
    batch, length = rows.tokens.shape
    chunk = min(chunk, length)
    scored_BxS = rows.loss_weights != 0
    slot_BxS, order_BxS = _true_first(scored_BxS)

    def in_chunks(x_BxS):
        """Puts scored tokens first and gives `[chunks, B, chunk, ...]`."""
        padding = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x_BxS.ndim - 2)
        x = jnp.pad(x_BxS, padding).reshape(batch, -1, chunk, *x_BxS.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    ordered_scored_BxS = jnp.take_along_axis(scored_BxS, order_BxS, axis=1)
    target_BxS = jnp.take_along_axis(rows.tokens, order_BxS, axis=1)
    parent_BxS = jnp.maximum(jnp.take_along_axis(rows.parent, order_BxS, axis=1), 0)
    parent_hidden_BxSxM = jnp.take_along_axis(hidden_BxSxM, parent_BxS[..., None], axis=1)

    def project(hidden_BxCxM, target_BxC, scored_BxC):
        logits_BxCxV = model.logits(hidden_BxCxM)
        # Taken by its index, the target's logit would bring the parts of the vocabulary together.
        is_target_BxCxV = target_BxC[..., None] == jnp.arange(logits_BxCxV.shape[-1])
        target_logit_BxC = jnp.sum(jnp.where(is_target_BxCxV, logits_BxCxV, 0), axis=-1)
        logprob_BxC = target_logit_BxC - jax.nn.logsumexp(logits_BxCxV, axis=-1)
        return tuple(
            shard(jnp.where(scored_BxC, measured_BxC, 0), "BxC", mesh)
            for measured_BxC in measures(logits_BxCxV, logprob_BxC)
        )

    # Around the condition, not within: it would keep what its branches need of the table, once per chunk.
    @jax.checkpoint
    def one_chunk(_, inputs):
        if not model.compute.skip_unscored:
            return None, project(*inputs)
        scored_BxC = inputs[2]
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(project, *inputs))
        return None, jax.lax.cond(jnp.any(scored_BxC), project, lambda *_: nothing, *inputs)

    chunks = in_chunks(parent_hidden_BxSxM), in_chunks(target_BxS), in_chunks(ordered_scored_BxS)
    _, measured_CsxBxC = jax.lax.scan(one_chunk, None, chunks)

    def in_place(x_CsxBxC):
        ordered_BxS = jnp.moveaxis(x_CsxBxC, 0, 1).reshape(batch, -1)[:, :length]
        return jnp.take_along_axis(ordered_BxS, slot_BxS, axis=1)

    return tuple(map(in_place, measured_CsxBxC))


def _true_first(mark_BxS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a stable order of each row that puts what is marked first: the slot of every token, and the token of
    every slot.

    Written without a sort, which a TPU's compiler takes long over.
    """
    marked_BxS = jnp.cumsum(mark_BxS, axis=1)
    index_S = jnp.arange(mark_BxS.shape[1])
    slot_BxS = jnp.where(mark_BxS, marked_BxS, marked_BxS[:, -1:] + index_S + 1 - marked_BxS) - 1
    return slot_BxS, jax.vmap(lambda slot_S: jnp.zeros_like(slot_S).at[slot_S].set(index_S))(slot_BxS)
