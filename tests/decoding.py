"""The jitted parts of sampling, driven row by row, and the same from scratch for every token."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.models.unstacked import apart
from jax_backtrack.sampling.batching import Batch, Engine, Request
from jax_backtrack.sampling.loop import Knobs, Plan


def knobs(max_resets=2, bias=0.0, temperature=1.0, top_p=1.0, min_p=0.0, penalty=1.0) -> Knobs:
    """`bias` is a number, or an array `[positions]` or `[rows, positions]`."""
    bias = np.atleast_2d(np.asarray(bias, np.float32))
    numbers = (jnp.float32(number) for number in (temperature, top_p, min_p, penalty))
    return Knobs(*numbers, jnp.int32(max_resets), jnp.asarray(bias))


def engine(model, plan: Plan, knobs: Knobs, layers_apart: bool = True, dtype: str = "float32") -> Engine:
    return Engine(model, *nnx.split(model), apart(model) if layers_apart else None, plan, knobs, dtype)


def sample(
    engine: Engine, requests: list[Request], rows: int, ring: int, prompt: int = 8, steps=None, beginning=()
) -> list[list]:
    """Ids that each request's row wrote, drafts and resets included."""
    batch, written = Batch(engine, rows, prompt, ring, beginning), {request.number: [] for request in requests}
    for updates in batch.run(requests, steps):
        for update in updates:
            written[update.number] += update.ids.tolist()
    return [written[request.number] for request in requests]


def naive(logits_of, request: Request, row: int, plan: Plan, knobs: Knobs, ring: int) -> list[int]:
    """One row, one token at a time, each from the logits of a full pass over the row's context. Written for itself.

    `logits_of(context)` gives the logits behind a list of ids.
    """
    prompt, context = request.prompt_ids.tolist(), request.ids.tolist()
    bias = np.asarray(knobs.reset_bias)[row % len(knobs.reset_bias)]
    emitted, resets, room, start = [], 0, ring, len(prompt)
    while room:
        logits = logits_of(context)
        for first, behind in plan.unused_ids:
            logits[first:behind] = -np.inf
        if plan.penalty:
            for token in set(context):
                factor = float(knobs.penalty)
                logits[token] = logits[token] * factor if logits[token] < 0 else logits[token] / factor
        if plan.reset_id is not None:
            here = min(len(context) - start, len(bias) - 1)
            logits[plan.reset_id] += bias[here] if resets < knobs.max_resets else -np.inf
        token = _chosen(logits, request.seed, len(emitted), plan, knobs)
        emitted.append(token)
        room -= 1
        if token in plan.stop_ids:
            break
        if token == plan.reset_id:
            resets += 1
            again = {"keep": [*context, token], "rewind": [*prompt, token], "resample": list(prompt)}
            context = again[plan.context]
            room = room if plan.context == "keep" else ring
        else:
            context.append(token)
    return emitted


def _chosen(logits, seed: int, count: int, plan: Plan, knobs: Knobs) -> int:
    if plan.greedy:
        return int(logits.argmax())
    logits = logits / float(knobs.temperature)
    order = np.argsort(-logits)
    if plan.top_k:
        logits[order[plan.top_k :]] = -np.inf
    if plan.top_p:
        mass = _mass(logits)[order]
        logits[order[np.cumsum(mass) - mass >= float(knobs.top_p)]] = -np.inf
    if plan.min_p:
        mass = _mass(logits)
        logits[mass < float(knobs.min_p) * mass.max()] = -np.inf
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
