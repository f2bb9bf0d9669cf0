"""Conversations that a judge reads: in batches of like lengths."""

from collections.abc import Iterator, Mapping

import numpy as np

from jax_backtrack.errors import InputError
from jax_backtrack.sampling.batching import pad_to_bucket


def by_length(
    ids_of: Mapping[int, np.ndarray], rows: int, longest: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batches of `rows` conversations in order of length: their keys, tokens int32 `[B, S]` and lengths int32 `[B]`.

    Rows are padded to one of few lengths, for few compilations. The last batch may have fewer keys than rows; those
    left over have one token. Raises InputError where a conversation is longer than the judge's positions.
    """
    order = sorted(ids_of, key=lambda key: len(ids_of[key]))
    if order and (most := len(ids_of[order[-1]])) > longest:
        raise InputError(f"a conversation of {most} tokens exceeds the judge's {longest} positions")
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        tokens_BxS = np.zeros((rows, pad_to_bucket(len(ids_of[chosen[-1]]))), np.int32)
        length_B = np.ones(rows, np.int32)
        for row, key in enumerate(chosen):
            length_B[row] = len(ids_of[key])
            tokens_BxS[row, : length_B[row]] = ids_of[key]
        yield chosen, tokens_BxS, length_B
