"""Verdicts without generation: which of two words a model would begin its answer with."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.backtracking import trees
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.judges.conversations import by_length
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer


class NextToken:
    """Of two words the share of the second in the probability of both, by the first token of each.

    `rows` conversations are read at a time, in order of length. `kind` says in an error what the model is not.
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, words: tuple[str, str], kind: str, rows: int):
        self._rows, self._longest = rows, model.config.max_position_embeddings
        self._graph, self._params = nnx.split(model)
        ids = [tokenizer.encode(word) for word in words]
        if ids[0][0] == ids[1][0]:
            raise InputError(f"the judge's tokenizer begins {' and '.join(words)} alike: it is no {kind}")
        self._word_ids = np.array([word_ids[0] for word_ids in ids])

    def __call__(self, ids_of: Mapping[int, np.ndarray], progress: Callable[[int], None]) -> dict[int, float]:
        """Returns the share after each conversation, given by its ids up to where the verdict begins; by the same
        keys."""
        shares = {}
        for chosen, tokens_BxS, length_B in by_length(ids_of, self._rows, self._longest):
            logits_Bx2 = _next_logits(self._graph, self._params, tokens_BxS, length_B - 1, self._word_ids)
            shares |= zip(chosen, np.asarray(jax.nn.softmax(logits_Bx2)[:, 1], np.float64).tolist(), strict=False)
            progress(len(chosen))
        return shares


@functools.partial(jax.jit, static_argnames="graph")
def _next_logits(graph, params, tokens_BxS, last_B, ids_C) -> jax.Array:
    """Returns logits `[B, C]` of some tokens behind each row's `last` one."""
    model, rows = nnx.merge(graph, params), trees.causal(tokens_BxS)
    hidden_BxSxM = model.hidden(rows.tokens, rows.position, rows.subtree_end)
    hidden_Bx1xM = jnp.take_along_axis(hidden_BxSxM, last_B[:, None, None], axis=1)
    return model.logits(hidden_Bx1xM)[:, 0, ids_C]
