"""What a model makes of a reply: hidden states behind its first layers, pooled over the reply."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.backtracking import trees
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.judges.conversations import by_length
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message

_FIRST = 32  # tokens of a reply whose mean is taken by itself: most replies comply or decline within them


class Reader:
    """Reads conversations with the first `layers` layers of a model, `rows` at a time, in order of length.

    tokens: of a reply that are read; what is behind them does not count
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, layers: int, tokens: int, rows: int = 8):
        if not 1 <= layers <= model.config.num_hidden_layers:
            raise InputError(f"judge.layers is {layers}; the model has {model.config.num_hidden_layers}")
        if layers % (group := len(model.config.windows)):
            raise InputError(f"judge.layers is {layers}; this model's layers come in groups of {group}")
        self._tokenizer, self._tokens, self._rows = tokenizer, tokens, rows
        self._longest = model.config.max_position_embeddings
        self._graph, self._params = nnx.split(_first_layers(model, layers))
        self.features = 3 * model.config.hidden_size

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        replies: Sequence[str],
        progress: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """float32 `[N, features]`: means over the reply and over its beginning, and the state of its last token."""
        found_NxF = np.zeros((len(replies), self.features), np.float32)
        read = [self._ids(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        conversations = dict(enumerate(ids for ids, _ in read))
        for chosen, tokens_BxS, end_B in by_length(conversations, self._rows, self._longest):
            begin_B = np.zeros(self._rows, np.int32)
            begin_B[: len(chosen)] = [read[i][1] for i in chosen]
            pooled_BxF = np.asarray(_pooled(self._graph, self._params, tokens_BxS, begin_B, end_B))
            found_NxF[chosen] = pooled_BxF[: len(chosen)]
            progress(len(chosen))
        return found_NxF

    def _ids(self, prompt: Sequence[Message], reply: str) -> tuple[np.ndarray, int]:
        """Prompt and reply with its end of turn, and where the reply begins."""
        before, said = self._tokenizer.render(prompt), self._tokenizer.begin_reply(reply)[: self._tokens]
        ids = np.concatenate([before, said, [self._tokenizer.eot_id]])
        return ids, len(before)


def _first_layers(model: Transformer, layers: int) -> Transformer:
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    shorter = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), compute=model.compute))
    state = nnx.state(model, nnx.Param)
    state["blocks"] = jax.tree.map(lambda leaf_Lx: leaf_Lx[:layers], state["blocks"])
    nnx.update(shorter, state)
    return shorter


@functools.partial(jax.jit, static_argnames="graph")
def _pooled(graph, params, tokens_BxS, begin_B, end_B) -> jax.Array:
    model, rows = nnx.merge(graph, params), trees.causal(tokens_BxS)
    hidden_BxSxM = model.hidden(rows.tokens, rows.position, rows.subtree_end).astype(jnp.float32)
    index_S = jnp.arange(tokens_BxS.shape[1])

    def mean(end_B):
        within_BxS = (index_S >= begin_B[:, None]) & (index_S < end_B[:, None])
        return jnp.einsum("bs,bsm->bm", within_BxS, hidden_BxSxM) / within_BxS.sum(axis=1, keepdims=True)

    last_BxM = jnp.take_along_axis(hidden_BxSxM, end_B[:, None, None] - 1, axis=1)[:, 0]
    return jnp.concatenate([mean(end_B), mean(jnp.minimum(end_B, begin_B + _FIRST)), last_BxM], axis=1)
