"""Gives a model and its tokenizer the token `[RESET]`, so that both agree."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jax_backtrack.hub.tokenizer import ChatTokenizer, with_reset
from jax_backtrack.models.transformer import Transformer

# The row of [RESET] starts at the mean of these words' rows. From the mean of all rows a short training never learns
# to emit the token: its logit starts far below those of words that do the same work, such as "Sorry".
UNDOING_WORDS = ("Sorry", "undo", "delete", "reset", "wait")
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
        row_M = jnp.stack([table_VxM[np.asarray(ids)].mean(axis=0) for ids in words]).mean(axis=0)
        if tokenizer.reset_id >= table_VxM.shape[0]:
            missing = -(-(tokenizer.reset_id + 1) // _ROWS) * _ROWS - table_VxM.shape[0]
            table_VxM = jnp.concatenate([table_VxM, jnp.zeros((missing, table_VxM.shape[1]), table_VxM.dtype)])
        param.set_value(table_VxM.at[tokenizer.reset_id].set(row_M.astype(table_VxM.dtype)))
    model.config = dataclasses.replace(model.config, vocab_size=model.embedding_VxM.shape[0])
    return tokenizer
