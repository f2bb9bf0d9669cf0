"""Gives a model and its tokenizer the token `[RESET]`, so that both agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_backtrack.models.assign import assign
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, with_reset

# The row of [RESET] starts on the far side of these words. From the mean of all rows a short training never learns to
# emit the token: its logit starts far below those of words that do the same work, such as "Sorry".
UNDOING_WORDS = ("Sorry", "undo", "delete", "reset", "wait")
# How many times as far from the mean of all rows, in the words' direction, as the farthest of the words.
_BEYOND = 2.0
# A vocabulary that must grow grows to a multiple of this many rows, so that it still divides over a mesh.
_ROWS = 64


def add_reset(model: Transformer, tokenizer: ChatTokenizer) -> ChatTokenizer:
    """Returns a tokenizer with `[RESET]` and sets the model's rows for it, in place.

    A spare token of the vocabulary is reused; without one the vocabulary grows, in the configuration too.
    Where the tokenizer has `[RESET]` already, nothing changes.
    """
    if tokenizer.reset_id is not None:
        return tokenizer
    tokenizer = with_reset(tokenizer)
    words = [tokenizer.encode(word) for word in UNDOING_WORDS]
    tables = [model.embedding_VxM] + ([] if model.config.tie_word_embeddings else [model.head_VxM])
    for param in tables:
        table_VxM = param[...]
        words_WxM = jnp.stack([table_VxM[np.asarray(ids)].mean(axis=0, dtype=jnp.float32) for ids in words])
        row_M = row_beyond(words_WxM, table_VxM.mean(axis=0, dtype=jnp.float32))
        if tokenizer.reset_id >= table_VxM.shape[0]:
            missing = -(-(tokenizer.reset_id + 1) // _ROWS) * _ROWS - table_VxM.shape[0]
            table_VxM = jnp.concatenate([table_VxM, jnp.zeros((missing, table_VxM.shape[1]), table_VxM.dtype)])
        assign(param, table_VxM.at[tokenizer.reset_id].set(row_M.astype(table_VxM.dtype)))
    model.config = dataclasses.replace(model.config, vocab_size=model.embedding_VxM.shape[0])
    return tokenizer


def row_beyond(words_WxM: jax.Array, mean_M: jax.Array) -> jax.Array:
    """Returns the row that lies from the mean of all rows in the direction of the words' mean, and twice as far in it
    as any word.

    The mean of the words would lie between them: whatever the hidden state, a logit of it is the mean of theirs, and
    one of them is as likely or likelier. What training does to make it likely makes them likely. Beyond them there are
    hidden states that make this row likelier than every one of them, and training finds those.
    """
    away_WxM = words_WxM - mean_M
    direction_M = away_WxM.mean(axis=0)
    length_W = away_WxM @ direction_M  # the mean of these is the direction's own
    own = direction_M @ direction_M
    farthest = jnp.where(own > 0, length_W.max() / jnp.where(own > 0, own, 1), 0)
    return mean_M + _BEYOND * farthest * direction_M
