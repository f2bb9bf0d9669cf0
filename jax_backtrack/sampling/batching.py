"""Continuous batching: many prompts stream through a fixed number of rows.

A row that is done is given the next prompt while the others go on. A prompt that some row still holds, as the next of
several samples of it mostly is, is copied there and not read again.
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
from jax_backtrack.sampling.loop import Knobs, Plan, Row, State, admit, admit_again, decode, read, start

# Prompts are padded to one of two lengths per doubling, and at least to a multiple of this: one compilation each.
_BUCKET = 8
_STEPS = 64  # of one call of the loop, at most


@dataclasses.dataclass(frozen=True)
class Request:
    """A reply that is wanted: `number` names it; ids of the prompt and of the reply's first words; seed."""

    number: int
    prompt_ids: np.ndarray
    prefix_ids: np.ndarray
    seed: int

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([self.prompt_ids, self.prefix_ids])

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.prefix_ids)

    def is_like(self, other: "Request | None") -> bool:
        """Whether both begin with the same tokens."""
        return other is not None and all(
            np.array_equal(*both) for both in ((self.prompt_ids, other.prompt_ids), (self.prefix_ids, other.prefix_ids))
        )


@dataclasses.dataclass(frozen=True)
class Update:
    """What one request's row has written since the last one; `done` where it writes no more."""

    number: int
    ids: np.ndarray
    log_probs: np.ndarray | None
    reset_log_probs: np.ndarray | None
    done: bool


@dataclasses.dataclass(frozen=True)
class Engine:
    """What all batches of a sampler share; `layers` where they are apart. `compiled` collects what was used."""

    model: Transformer
    graph: object
    params: object
    layers: list | None
    plan: Plan
    knobs: Knobs
    cache_dtype: str
    compiled: dict[str, None] = dataclasses.field(default_factory=dict)


class Batch:
    """`rows` rows for prompts of up to `prompt` tokens, and replies of up to `ring` tokens.

    What all prompts begin with, if it is given, is read once; every prompt must have more tokens than that.
    """

    def __init__(self, engine: Engine, rows: int, prompt: int, ring: int, beginning: Sequence[int] = ()):
        self._engine, self._rows, self._ring = engine, rows, ring
        self._begun = len(beginning)
        self._prompt = self._padded(prompt)
        self._parts = row_parts(engine.model.compute.mesh)
        config, mesh, stacked = engine.model.config, engine.model.compute.mesh, engine.layers is None
        state = start(config, mesh, engine.plan, rows, self._prompt, ring, engine.cache_dtype, stacked)
        if mesh is not None and mesh.size == 1:
            # What comes back of the loop lies on this mesh, as parameters do; another place is another compilation.
            state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
        self._state = state
        self._beginning = self._read_beginning(np.asarray(beginning, np.int32)) if self._begun else None
        self._requests: list[Request | None] = [None] * rows  # last given to each row
        self._is_open = np.zeros(rows, bool)
        self._count = np.zeros(rows, np.int32)
        self._cancelled = np.zeros(rows, bool)

    @property
    def requests(self) -> tuple[Request | None, ...]:
        """What was last given to each row."""
        return tuple(self._requests)

    def run(
        self,
        requests: Sequence[Request],
        steps: int | None = None,
        before: Callable[[State], None] = lambda state: None,
    ) -> Iterator[list[Update]]:
        """Updates, after every call of the loop, of the rows that wrote: after at most `steps` tokens each.

        before: is shown the rows before every call, which takes them: their arrays are gone afterwards
        """
        engine, steps = self._engine, steps or self._engine.plan.steps
        waiting = deque(requests)
        while waiting or self._is_open.any():
            while waiting and not self._is_open.all():
                self._admit(waiting)
            self._note("write replies")
            before(self._state)
            self._state, written = decode(
                engine.graph,
                engine.params,
                engine.layers,
                self._state,
                engine.knobs,
                self._cancelled,
                steps,
                bool(waiting),
                engine.plan,
            )
            yield self._updates(*jax.device_get((written, self._state.count, self._state.done)))

    def cancel(self, number: int) -> None:
        """Ends a request; no update of it follows."""
        for row, request in enumerate(self._requests):
            if self._is_open[row] and request.number == number:
                self._is_open[row], self._cancelled[row] = False, True

    def _updates(self, written, count_B, done_B) -> list[Update]:
        updates = []
        for row in np.flatnonzero(self._is_open):
            new = count_B[row] - self._count[row]
            parts = [
                None if array is None else array[row, :new]
                for array in (written.token, written.log_prob, written.reset_log_prob)
            ]
            updates.append(Update(self._requests[row].number, *parts, bool(done_B[row])))
        self._count, self._is_open = count_B.copy(), self._is_open & ~done_B
        self._cancelled[:] = False
        return updates

    def _admit(self, waiting: deque[Request]) -> None:
        """Gives every part of the rows that has room one of the waiting requests."""
        rows = self._rows // self._parts
        fresh: dict[int, tuple[Request, int]] = {}  # by part of the rows: the request and its row of the part
        copied: dict[int, tuple[Request, int, int]] = {}  # and the row to copy from
        for part in range(self._parts):
            here = slice(part * rows, (part + 1) * rows)
            if not waiting or self._is_open[here].all():
                continue
            request, row = waiting.popleft(), int(np.argmin(self._is_open[here]))
            alike = [place for place, other in enumerate(self._requests[here]) if request.is_like(other)]
            if alike and not self._engine.plan.penalty:
                copied[part] = request, row, alike[0]
            else:
                fresh[part] = request, row
            place = part * rows + row
            self._requests[place], self._is_open[place] = request, True
            self._count[place], self._cancelled[place] = 0, False
        if copied:
            self._copy(copied)
        if fresh:
            self._read(fresh)

    def _copy(self, copied: dict[int, tuple[Request, int, int]]) -> None:
        source_N, index_N = np.zeros(self._parts, np.int32), np.full(self._parts, -1, np.int32)
        seed_N = np.zeros(self._parts, np.uint32)
        for part, (request, row, source) in copied.items():
            source_N[part], index_N[part], seed_N[part] = source, row, request.seed
        self._note("copy prompts")
        self._state = admit_again(self._state, source_N, seed_N, index_N)

    def _padded(self, length: int) -> int:
        return self._begun + bucket(length - self._begun)

    def _read_beginning(self, ids: np.ndarray) -> Cache:
        engine, tokens_NxC = self._engine, np.tile(ids, (self._parts, 1))
        self._engine.compiled[f"read the {self._parts} x {self._begun} tokens that all prompts begin with"] = None
        return read(engine.graph, engine.params, engine.layers, None, tokens_NxC, engine.cache_dtype)

    def _read(self, wanted: dict[int, tuple[Request, int]]) -> None:
        engine, padded = self._engine, max(self._padded(request.length) for request, _ in wanted.values())
        tokens_NxP = np.zeros((self._parts, padded), np.int32)
        index_N, one_N = np.full(self._parts, -1, np.int32), np.ones(self._parts, np.int32)
        row_N = Row(one_N.copy(), one_N.copy(), one_N.copy(), one_N.copy(), one_N.astype(np.uint32))
        for part, (request, row) in wanted.items():
            ids, index_N[part] = request.ids, row
            tokens_NxP[part, : len(ids)] = ids
            row_N.start[part], row_N.length[part] = len(request.prompt_ids), len(ids)
            row_N.last[part], row_N.last_of_prompt[part] = ids[-1], request.prompt_ids[-1]
            row_N.seed[part] = request.seed
        behind = f" behind {self._begun}" if self._begun else ""
        self._engine.compiled[f"read {self._parts} x {padded - self._begun} tokens of prompts{behind}"] = None
        new_NxP = tokens_NxP[:, self._begun :]
        has_read = read(engine.graph, engine.params, engine.layers, self._beginning, new_NxP, engine.cache_dtype)
        self._state = admit(self._state, has_read, tokens_NxP, row_N, index_N, engine.plan)

    def _note(self, what: str) -> None:
        self._engine.compiled[f"{what}, {self._rows} rows of {self._prompt} + {self._ring} slots"] = None


def bucket(length: int) -> int:
    """What a prompt of so many tokens is padded to."""
    step = _step(length)
    return -(-length // step) * step


def common_beginning(requests: Sequence[Request]) -> np.ndarray:
    """What the prompts of all requests begin with, such as the chat template's system message: ids.

    Cut to the lengths of buckets, so that it is another compilation for few of them, and so that every prompt has a
    token more. Empty where fewer than three prompts would save by it.
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


def pools(requests: Sequence[Request], rows: int) -> list[list[Request]]:
    """Requests by the length of their prompts, so that short ones do not attend over the slots of long ones.

    A pool ends with rows that wait for each other, so one of less than `8 * rows` requests is not worth its own; it
    goes with the next longer ones. Order is kept within a pool.
    """
    by_doubling: dict[int, list[Request]] = {}
    for request in requests:
        by_doubling.setdefault((request.length - 1).bit_length(), []).append(request)
    found: list[list[Request]] = []
    small: list[Request] = []
    for doubling in sorted(by_doubling):
        small += by_doubling[doubling]
        if len(small) >= 8 * rows:
            found.append(small)
            small = []
    if small:
        found.append(small)
    order = {id(request): place for place, request in enumerate(requests)}
    return [sorted(pool, key=lambda request: order[id(request)]) for pool in reversed(found)]


def steps_of(new_tokens: int) -> int:
    """Steps of one call of the loop, for replies of up to so many tokens."""
    return min(new_tokens, _STEPS)
