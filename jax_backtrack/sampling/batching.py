"""Continuous batching: many prompts stream through a fixed number of slots.

A slot that is done is given the next prompt while the others go on. A prompt that some slot still holds, as the next of
several samples of it mostly is, is copied from there and not prefilled again.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_backtrack.distributed.mesh import row_parts
from jax_backtrack.models.kv_cache import Cache
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.sampling.loop import (
    DecodeState,
    SlotInfo,
    clone_slot,
    decode,
    init_decode_state,
    insert,
    prefill,
)
from jax_backtrack.sampling.settings import StaticParams, TracedParams

# Prompts are padded to one of two lengths per doubling, and at least to a multiple of this: one compilation each.
_BUCKET = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """A reply that is wanted: its number, ids of the prompt and of the reply's first words, its seed."""

    number: int
    prompt_ids: np.ndarray
    prefill_ids: np.ndarray
    seed: int

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt_ids, self.prefill_ids])

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.prefill_ids)

    def is_like(self, other: "Request | None") -> bool:
        """Returns whether both begin with the same tokens."""
        return (
            other is not None
            and np.array_equal(self.prompt_ids, other.prompt_ids)
            and np.array_equal(self.prefill_ids, other.prefill_ids)
        )


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """Holds what one request's slot has written since the last one; `done` where it writes no more."""

    number: int
    ids: np.ndarray
    logprobs: np.ndarray | None
    reset_logprobs: np.ndarray | None
    done: bool


@dataclasses.dataclass(frozen=True)
class Engine:
    """Holds what all batches of a sampler share. `compiled` collects what was used."""

    model: Transformer
    graph: object
    params: object
    static: StaticParams
    traced: TracedParams
    cache_dtype: str
    compiled: dict[str, None] = dataclasses.field(default_factory=dict)


class ContinuousBatch:
    """Streams requests through `slots` slots: for prompts of up to `prompt` tokens, and replies of up to `ring`.

    The prefix that all prompts share, if it is given, is prefilled once; every prompt must have more tokens than that.
    """

    def __init__(self, engine: Engine, slots: int, prompt: int, ring: int, prefix: Sequence[int] = ()):
        self._engine, self._slots, self._ring = engine, slots, ring
        self._shared = len(prefix)
        self._prompt = self._padded(prompt)
        self._parts = row_parts(engine.model.compute.mesh)
        model, mesh = engine.model, engine.model.compute.mesh
        state = init_decode_state(
            model.cache_type, model.config, mesh, engine.static, slots, self._prompt, ring, engine.cache_dtype
        )
        if mesh is not None and mesh.size == 1:
            # What comes back of the loop lies on this mesh, as parameters do; another place is another compilation.
            state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        self._state = state
        self._prefix = self._prefill_prefix(np.asarray(prefix, np.int32)) if self._shared else None
        self._requests: list[Request | None] = [None] * slots  # last given to each slot
        self._is_open = np.zeros(slots, bool)
        self._count = np.zeros(slots, np.int32)
        self._cancelled = np.zeros(slots, bool)

    @property
    def requests(self) -> tuple[Request | None, ...]:
        """Returns what was last given to each slot."""
        return tuple(self._requests)

    def run(
        self,
        requests: Sequence[Request],
        steps: int | None = None,
        before: Callable[[DecodeState], None] = lambda state: None,
    ) -> Iterator[list[StepOutput]]:
        """Yields, after every call of the loop, the outputs of the slots that wrote: of at most `steps` tokens each.

        before: is shown the state before every call, which takes it: its arrays are gone afterwards
        """
        engine, steps = self._engine, steps or self._engine.static.steps
        waiting = deque(requests)
        while waiting or self._is_open.any():
            while waiting and not self._is_open.all():
                self._fill(waiting)
            self._note("write replies")
            before(self._state)
            self._state, outputs = decode(
                engine.graph,
                engine.params,
                self._state,
                engine.traced,
                self._cancelled,
                steps,
                bool(waiting),
                engine.static,
            )
            yield self._outputs(*jax.device_get((outputs, self._state.count, self._state.done)))

    def cancel(self, number: int) -> None:
        """Ends a request; no output of it follows."""
        for slot, request in enumerate(self._requests):
            if self._is_open[slot] and request.number == number:
                self._is_open[slot], self._cancelled[slot] = False, True

    def _outputs(self, decoded, count_B, done_B) -> list[StepOutput]:
        outputs = []
        for slot in np.flatnonzero(self._is_open):
            new = count_B[slot] - self._count[slot]
            parts = [
                None if array is None else array[slot, :new]
                for array in (decoded.token, decoded.logprob, decoded.reset_logprob)
            ]
            outputs.append(StepOutput(self._requests[slot].number, *parts, bool(done_B[slot])))
        self._count, self._is_open = count_B.copy(), self._is_open & ~done_B
        self._cancelled[:] = False
        return outputs

    def _fill(self, waiting: deque[Request]) -> None:
        """Fills one slot of every part of them that has room with a waiting request."""
        slots = self._slots // self._parts
        fresh: dict[int, tuple[Request, int]] = {}  # by part of the slots: the request and its slot of the part
        copied: dict[int, tuple[Request, int, int]] = {}  # and the slot to copy from
        for part in range(self._parts):
            of_part = slice(part * slots, (part + 1) * slots)
            if not waiting or self._is_open[of_part].all():
                continue
            request, slot = waiting.popleft(), int(np.argmin(self._is_open[of_part]))
            alike = [place for place, other in enumerate(self._requests[of_part]) if request.is_like(other)]
            if alike and not self._engine.static.uses("repetition_penalty"):
                copied[part] = request, slot, alike[0]
            else:
                fresh[part] = request, slot
            place = part * slots + slot
            self._requests[place], self._is_open[place] = request, True
            self._count[place], self._cancelled[place] = 0, False
        if copied:
            self._clone(copied)
        if fresh:
            self._prefill(fresh)

    def _clone(self, copied: dict[int, tuple[Request, int, int]]) -> None:
        source_Z, index_Z = np.zeros(self._parts, np.int32), np.full(self._parts, -1, np.int32)
        seed_Z = np.zeros(self._parts, np.uint32)
        for part, (request, slot, source) in copied.items():
            source_Z[part], index_Z[part], seed_Z[part] = source, slot, request.seed
        self._note("copy prompts")
        self._state = clone_slot(self._state, source_Z, seed_Z, index_Z)

    def _padded(self, length: int) -> int:
        return self._shared + pad_to_bucket(length - self._shared)

    def _prefill_prefix(self, ids: np.ndarray) -> Cache:
        engine, tokens_ZxC = self._engine, np.tile(ids, (self._parts, 1))
        self._engine.compiled[f"prefill {self._parts} x {self._shared} tokens that all prompts share"] = None
        return prefill(engine.graph, engine.params, None, tokens_ZxC, engine.cache_dtype)

    def _prefill(self, requests: dict[int, tuple[Request, int]]) -> None:
        engine, padded = self._engine, max(self._padded(request.length) for request, _ in requests.values())
        tokens_ZxP = np.zeros((self._parts, padded), np.int32)
        index_Z, one_Z = np.full(self._parts, -1, np.int32), np.ones(self._parts, np.int32)
        slot_Z = SlotInfo(one_Z.copy(), one_Z.copy(), one_Z.copy(), one_Z.copy(), one_Z.astype(np.uint32))
        for part, (request, slot) in requests.items():
            ids, index_Z[part] = request.ids, slot
            tokens_ZxP[part, : len(ids)] = ids
            slot_Z.start[part], slot_Z.length[part] = len(request.prompt_ids), len(ids)
            slot_Z.last[part], slot_Z.last_of_prompt[part] = ids[-1], request.prompt_ids[-1]
            slot_Z.seed[part] = request.seed
        after = f" after {self._shared}" if self._shared else ""
        self._engine.compiled[f"prefill {self._parts} x {padded - self._shared} tokens of prompts{after}"] = None
        new_ZxP = tokens_ZxP[:, self._shared :]
        prefilled = prefill(engine.graph, engine.params, self._prefix, new_ZxP, engine.cache_dtype)
        self._state = insert(self._state, prefilled, tokens_ZxP, slot_Z, index_Z, engine.static)

    def _note(self, what: str) -> None:
        self._engine.compiled[f"{what}, {self._slots} slots of {self._prompt} + {self._ring} tokens"] = None


def pad_to_bucket(length: int) -> int:
    """Returns the length that a prompt of so many tokens is padded to."""
    step = _step(length)
    return -(-length // step) * step


def shared_prefix(requests: Sequence[Request]) -> np.ndarray:
    """Returns the ids that the prompts of all requests begin with, such as the chat template's system message.

    They are cut to the lengths of buckets, so that it is another compilation for few of them, and so that every prompt
    has a token more. Empty where fewer than three prompts would save by it.
    """
    prompts = {request.ids.tobytes(): request.ids for request in requests}.values()
    if len(prompts) < 3:
        return np.zeros(0, np.int32)
    shortest = min(map(len, prompts))
    stacked = np.stack([ids[: shortest - 1] for ids in prompts])
    common = int((stacked == stacked[0]).all(axis=0).cumprod().sum())
    step = _step(max(common, 1))
    return stacked[0, : common // step * step]


def _step(length: int) -> int:
    return max(_BUCKET, 2 ** (length - 1).bit_length() // 4)


def group_by_length(requests: Sequence[Request], slots: int) -> list[list[Request]]:
    """Groups requests by the length of their prompts, so that short ones do not attend over the length of long ones.

    A group ends with slots that wait for each other, so one of less than `8 * slots` requests is not worth its own; it
    goes with the next longer ones. Order is kept within a group.
    """
    by_doubling: dict[int, list[Request]] = {}
    for request in requests:
        by_doubling.setdefault((request.length - 1).bit_length(), []).append(request)
    groups: list[list[Request]] = []
    small: list[Request] = []
    for doubling in sorted(by_doubling):
        small += by_doubling[doubling]
        if len(small) >= 8 * slots:
            groups.append(small)
            small = []
    if small:
        groups.append(small)
    order = {id(request): place for place, request in enumerate(requests)}
    return [sorted(group, key=lambda request: order[id(request)]) for group in reversed(groups)]
