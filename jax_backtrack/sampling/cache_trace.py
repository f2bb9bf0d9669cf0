"""The cache step by step, for whoever wants to see a reset: which slots a row sees, and what stands in them."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jax_backtrack.sampling.batching import ContinuousBatch, Request
from jax_backtrack.sampling.loop import DecodeState

NOTHING = -1


@dataclasses.dataclass(frozen=True)
class CacheStep:
    """One step of the loop, of `B` rows with `S` slots each; arrays of the host.

    fed:    int32 `[B]`, the token that each row feeds
    slot:   where all rows write its keys and values
    sees:   bool `[B, S]`, the slots that it attends to, its own among them, as the cache gives them to attention
    holds:  int32 `[B, S]`, the token whose keys and values stand in a slot; -1 where none were written
    prompt: slots of the prompt; those of the ring are behind them
    resets: int32 `[B]`, so far
    done:   bool `[B]`, rows that have ended, which go on writing what nobody sees
    """

    fed: np.ndarray
    slot: int
    sees: np.ndarray
    holds: np.ndarray
    prompt: int
    resets: np.ndarray
    done: np.ndarray


def trace_cache(batch: ContinuousBatch, requests: Sequence[Request]) -> Iterator[CacheStep]:
    """Runs the requests, all at once, and gives every step. There is a row of the batch for each of them."""
    steps: list[CacheStep] = []

    def note(state: DecodeState) -> None:
        holds = steps.pop().holds if steps else _prompts(batch, state.cache.slots)
        steps.append(_step(state, holds))

    for _ in batch.run(requests, steps=1, before=note):
        yield steps[-1]


def _prompts(batch: ContinuousBatch, slots: int) -> np.ndarray:
    holds_BxS = np.full((len(batch.requests), slots), NOTHING, np.int32)
    for row, request in enumerate(batch.requests):
        if request is not None:
            holds_BxS[row, : request.length] = request.ids
    return holds_BxS


def _step(state: DecodeState, held_BxS: np.ndarray) -> CacheStep:
    cache = state.cache
    prompt, holds_BxS = cache.slots - cache.ring_size, held_BxS.copy()
    slot = prompt + int(cache.cursor)
    # Copies: on a CPU device_get would give views of buffers that the next call of the loop takes.
    fed_B, resets_B, done_B = map(np.array, (state.token, state.resets, state.done))
    holds_BxS[:, slot] = fed_B
    return CacheStep(fed_B, slot, np.array(cache.visible(1)[:, 0]), holds_BxS, prompt, resets_B, done_B)
