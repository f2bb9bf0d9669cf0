"""Log-likelihoods of continuations: what contexts have in common is read once."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.backtracking.losses import pair_margins
from jax_backtrack.backtracking.trees import Branch, TokenTrees, common_beginning, flatten
from jax_backtrack.data.process_local_batch import packed_batches
from jax_backtrack.distributed.mesh import on_host
from jax_backtrack.errors import InputError
from jax_backtrack.models.logprobs import logprobs_and_likeliest
from jax_backtrack.models.transformer import Transformer

_MULTIPLE = 256  # of a row's length: the blocks of the attention kernel

# Ids of a context, at least one, and of what follows it, at least one.
Pair = tuple[Sequence[int], Sequence[int]]


def log_likelihoods(
    model: Transformer,
    pairs: Sequence[Pair],
    *,
    max_seq_len: int = 1024,
    batch_size: int = 1,
    chunk: int = 128,
    progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """Returns `log p(continuation | context)` in nats of each pair, and whether the model would write just that,
    greedily.

    Pairs go into sequences of `max_seq_len` tokens, or more where one needs more, `batch_size` at a time, as branches
    of token trees: several continuations of one context hang under it, and contexts that begin alike share that.
    """
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise InputError(f"pair {number} has {len(context)} tokens of context and {len(continuation)} behind it")
    longest = max((len(context) + len(continuation) for context, continuation in pairs), default=0)
    max_seq_len = -(-max(max_seq_len, longest) // _MULTIPLE) * _MULTIPLE
    (graph, params), likelihoods = nnx.split(model), {}

    def tree(index: int) -> TokenTrees:
        context, continuation = pairs[index]
        return flatten(Branch(context, children=(Branch(continuation, pair_id=0, loss_weight=1.0),)))

    planned = plan(pairs, max_seq_len)
    for members, batch in packed_batches(planned, tree, max_seq_len, batch_size, model.compute.mesh):
        sums_2xBxS = on_host(_sums(graph, params, batch, chunk))
        for number, row in enumerate(members):
            log_p, others = sums_2xBxS[:, number, : len(row)]
            likelihoods.update(zip(row, zip(log_p.tolist(), (others == 0).tolist(), strict=True), strict=True))
        progress(sum(map(len, members)))
    return [likelihoods[index] for index in range(len(pairs))]


def plan(pairs: Sequence[Pair], max_seq_len: int) -> list[list[int]]:
    """Returns which pairs go into which row, by number: those with the most in common one behind the other."""
    rows: list[list[int]] = []
    length, before = max_seq_len, np.zeros(0, np.int32)
    for index in sorted(range(len(pairs)), key=lambda index: tuple(map(list, pairs[index]))):
        context, continuation = (np.asarray(ids, np.int32) for ids in pairs[index])
        new = len(context) + len(continuation) - common_beginning(before, context)
        if length + new > max_seq_len:
            rows.append([])
            length, new = 0, len(context) + len(continuation)
        rows[-1].append(index)
        length, before = length + new, context
    return rows


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _sums(graph: nnx.GraphDef, params: nnx.State, rows: TokenTrees, chunk: int) -> jax.Array:
    """Returns `[2, B, S]`, in each pair's slot: its log-likelihood, and how many of its tokens are not the
    likeliest."""
    logprob_BxS, likeliest_BxS = logprobs_and_likeliest(nnx.merge(graph, params), rows, chunk)
    measured = logprob_BxS, 1 - likeliest_BxS
    return jnp.stack([pair_margins(measured_BxS, rows.pair_id, rows.loss_weights) for measured_BxS in measured])
