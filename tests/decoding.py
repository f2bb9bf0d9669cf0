"""The jitted parts of sampling, driven row by row, and the same from scratch for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.models.unstacked import CpuDecodeModel
from jax_backtrack.sampling.batching import ContinuousBatch, Engine, Request
from jax_backtrack.sampling.settings import SamplingParams, StaticParams, TracedParams, split_params
from tests import tiny


def traced(max_resets=2, bias=0.0, temperature=1.0, **numbers) -> TracedParams:
    """`bias` is a number, or an array `[positions]` or `[rows, positions]`."""
    params = SamplingParams(max_resets=max_resets, temperature=temperature, **numbers)
    _, made = split_params(params, reset_mode="keep", reset_id=None, stop_ids=())
    return dataclasses.replace(made, reset_bias=jnp.atleast_2d(jnp.asarray(bias, jnp.float32)))


def engine(model, static: StaticParams, traced: TracedParams, unstacked: bool = True, dtype="float32") -> Engine:
    model = CpuDecodeModel(model) if unstacked else model
    return Engine(model, *nnx.split(model), static, traced, dtype)


def sample(
    engine: Engine, requests: list[Request], rows: int, ring: int, prompt: int = 8, steps=None, prefix=()
) -> list[list]:
    """Ids that each request's row wrote, drafts and resets included."""
    batch, written = ContinuousBatch(engine, rows, prompt, ring, prefix), {request.number: [] for request in requests}
    for outputs in batch.run(requests, steps):
        for output in outputs:
            written[output.number] += output.ids.tolist()
    return [written[request.number] for request in requests]


def naive(logits_of, request: Request, row: int, static: StaticParams, traced: TracedParams, ring: int) -> list[int]:
    """One row, one token at a time, each from the logits of a full pass over the row's context. Written for itself.

    `logits_of(context)` gives the logits behind a list of ids.
    """
    prompt, context = request.prompt_ids.tolist(), request.ids.tolist()
    bias = np.asarray(traced.reset_bias)[row % len(traced.reset_bias)]
    emitted, resets, room, start = [], 0, ring, len(prompt)
    while room:
        logits = logits_of(context)
        for first, behind in static.unused_ids:
            logits[first:behind] = -np.inf
        if static.uses("repetition_penalty"):
            for token in set(context):
                factor = float(traced.repetition_penalty)
                logits[token] = logits[token] * factor if logits[token] < 0 else logits[token] / factor
        if static.reset_id is not None:
            here = min(len(context) - start, len(bias) - 1)
            logits[static.reset_id] += bias[here] if resets < traced.max_resets else -np.inf
        token = _chosen(logits, request.seed, len(emitted), static, traced)
        emitted.append(token)
        room -= 1
        if token in static.stop_ids:
            break
        if token == static.reset_id:
            resets += 1
            again = {"keep": [*context, token], "rewind": [*prompt, token], "resample": list(prompt)}
            context = again[static.reset_mode]
            room = room if static.reset_mode == "keep" else ring
        else:
            context.append(token)
    return emitted


def _chosen(logits, seed: int, count: int, static: StaticParams, traced: TracedParams) -> int:
    if not static.uses("temperature"):
        return int(logits.argmax())
    logits = logits / float(traced.temperature)
    order = np.argsort(-logits)
    if static.top_k:
        logits[order[static.top_k :]] = -np.inf
    if static.uses("top_p"):
        mass = _mass(logits)[order]
        logits[order[np.cumsum(mass) - mass >= float(traced.top_p)]] = -np.inf
    if static.uses("min_p"):
        mass = _mass(logits)
        logits[mass < float(traced.min_p) * mass.max()] = -np.inf
    of_block, of_token = np.asarray(jax.random.uniform(jax.random.fold_in(jax.random.key(seed), count), (2,)))
    mass = _mass(logits)
    blocks = [mass[first : first + 256] for first in range(0, len(mass), 256)]
    block = _passed(np.array([one.sum() for one in blocks]), of_block)
    return 256 * block + _passed(blocks[block] / blocks[block].sum(), of_token)


def _passed(mass: np.ndarray, number: float) -> int:
    return int(np.searchsorted(np.cumsum(mass), number, side="right"))


def _mass(logits: np.ndarray) -> np.ndarray:
    mass = np.exp(logits.astype(np.float64) - logits.max())
    return mass / mass.sum()


R, E = tiny.RESET_ID, tiny.EOT_ID


NEW, PROMPT = 9, 8


MODELS = {family: tiny.model(seed=4, **fields) for family, fields in tiny.FAMILIES.items()}


GREEDY = StaticParams(reset_mode="keep", reset_id=R, stop_ids=(E,), steps=16)


SAMPLED = dataclasses.replace(GREEDY, used=frozenset({"temperature"}))


causal_logits = jax.jit(lambda graph, params, tokens: nnx.merge(graph, params)(tokens)[0], static_argnums=0)


def requests(count: int = 3, seed: int = 0) -> list[Request]:
    """Prompts of different lengths; number 1 has the first two tokens of its reply written for it."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        ids = rng.integers(5, tiny.VOCAB, rng.integers(4, PROMPT + 1), dtype=np.int32)
        begun = 2 if number == 1 else 0
        made.append(Request(number, ids[: len(ids) - begun], ids[len(ids) - begun :], seed=7 + number))
    return made


def logits_of(family: str):
    split = nnx.split(MODELS[family])

    def of(context: list[int]) -> np.ndarray:
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(context)] = context
        return np.array(causal_logits(*split, padded)[len(context) - 1])

    return of


def both(asked, plan, turned, family="llama", unstacked=True, rows=None) -> tuple[list, list]:
    """What the sampler writes, and what naive recomputation does."""
    rows = rows or len(asked)
    written = sample(engine(MODELS[family], plan, turned, unstacked), asked, rows, NEW)
    expected = [naive(logits_of(family), one, row, plan, turned, NEW) for row, one in enumerate(asked)]
    return written, expected


def forced_at(*places_of_rows) -> np.ndarray:
    """A bias that makes row b say [RESET] at exactly the given positions behind its prompt."""
    bias = np.full((len(places_of_rows), NEW + 3), -1e9, np.float32)
    for row, places in enumerate(places_of_rows):
        bias[row, list(places)] = 1e9
    return bias
