"""The jitted parts of sampling: a prompt is admitted to a row, and a loop writes one token per row and step.

In any step any row may take its draft back, end, and be given another prompt, while the others go on; none of it
compiles anew. A row's tokens depend on its prompt, its seed and the settings alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_backtrack.distributed.mesh import shard
from jax_backtrack.models.kv_cache import Cache
from jax_backtrack.sampling.logits import draw, keep_min_p, keep_top_k, keep_top_p, penalise, without

SETTINGS = ("graph", "plan")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiled loop depends on; another plan is another compilation.

    context:   reset context, "keep" | "rewind" | "resample"
    reset_id:  id of [RESET], or None for a model without it
    stop_ids:  ids that end a reply
    unused_ids: ids that no token has, which are never drawn: first and one behind the last of each run
    greedy:    take the likeliest token; temperature and cuts are not looked at
    top_k:     sample among the k likeliest tokens; 0 for all
    top_p, min_p, penalty: whether these are looked at
    log_probs: whether log-probabilities are kept
    steps:     the most steps of one call
    """

    context: str
    reset_id: int | None
    stop_ids: tuple[int, ...]
    greedy: bool
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    penalty: bool = False
    log_probs: bool = False
    steps: int = 64
    unused_ids: tuple[tuple[int, int], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """Numbers that may change without a new compilation.

    temperature, top_p, min_p, penalty: float32 scalars
    max_resets: int32 scalar, after which [RESET] is masked out
    reset_bias: float32 `[B, positions]` or `[1, positions]`, added to the logit of [RESET] by the position behind the
                prompt that is written; the last one for all positions behind it
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    max_resets: jax.Array
    reset_bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """What stands in a row from the start. All are scalars, or `[B]` for a batch.

    start:  int32, tokens of the prompt: where the reply begins, which is where a reset returns to
    length: int32, tokens of the prompt and of the first words of the reply where those are given
    last, last_of_prompt: int32, the last of those tokens, and the last of the prompt
    seed:   uint32, of the row's own random numbers
    """

    start: jax.Array
    length: jax.Array
    last: jax.Array
    last_of_prompt: jax.Array
    seed: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries.

    cache:   the rows' visible past
    row:     what they began with, `[B]`
    token:   int32 `[B]`, to be fed next
    count:   int32 `[B]`, tokens written so far, drafts and resets included
    resets:  int32 `[B]`
    done:    bool `[B]`; a row that is done or has no prompt yet writes nothing
    asked, seen: bool `[B, V]`, the tokens of the prompt, and those of the whole context; None unless the plan has a
             penalty
    """

    cache: Cache
    row: Row
    token: jax.Array
    count: jax.Array
    resets: jax.Array
    done: jax.Array
    asked: jax.Array | None
    seen: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """What one call wrote, `[B, plan.steps]` each: of a row as many as its `count` grew by, from the first.

    log_prob, reset_log_prob: float32, of the token and of [RESET], by the model itself: without bias, temperature,
    penalty and cuts, and with the rows that no token has among what the probabilities sum over, as in training; None
    unless the plan asks
    """

    token: jax.Array
    log_prob: jax.Array | None
    reset_log_prob: jax.Array | None


@functools.partial(jax.jit, static_argnums=range(8))
def start(config, mesh: Mesh | None, plan: Plan, rows: int, prompt: int, ring: int, dtype: str, stacked: bool) -> State:
    """A batch in which every row is done: for prompts of up to `prompt` tokens and replies of `ring`."""
    nothing_B = shard(jnp.zeros(rows, jnp.int32), "B", mesh)
    seen_BxV = shard(jnp.zeros((rows, config.vocab_size), bool), "BxV", mesh) if plan.penalty else None
    return State(
        cache=Cache.empty(config, rows, prompt, ring, dtype, mesh, stacked),
        row=Row(nothing_B, nothing_B, nothing_B, nothing_B, nothing_B.astype(jnp.uint32)),
        token=nothing_B,
        count=nothing_B,
        resets=nothing_B,
        done=nothing_B == 0,
        asked=seen_BxV,
        seen=seen_BxV,
    )


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def read(graph: nnx.GraphDef, params, layers, beginning: Cache | None, tokens_NxP: jax.Array, dtype: str) -> Cache:
    """The keys and values, in `dtype`, of what `N` prompts begin with and of their `P` tokens behind that.

    beginning: as this gives it for tokens that none of the prompts has before them; None where there is none
    layers:    the model's layers apart, where the caches have them so; else None
    """
    model = nnx.merge(graph, params)
    count, length = tokens_NxP.shape
    if beginning is None:
        cache = Cache.empty(model.config, count, 0, length, dtype, model.compute.mesh, stacked=layers is None)
    else:
        cache = beginning.as_prompts(length)
    return model.extend(tokens_NxP, cache, layers)[1]


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def admit(state: State, has_read: Cache, tokens_NxP: jax.Array, row_N: Row, index_N, plan: Plan) -> State:
    """Gives each of `N` prompts that were read, padded on the right, to a row.

    The rows lie in `N` parts, on a mesh one for each part of it. Prompt `n` goes to the row at `index_N[n]` of part
    `n`, and nowhere where that is -1. It has its own compilation for every size of batch, which `read` has not.
    """
    count, length = tokens_NxP.shape
    state = dataclasses.replace(state, cache=state.cache.put_prompts(index_N, has_read))
    if plan.penalty:

        def in_context(tokens_N):
            stand_NxP = jnp.arange(length) < tokens_N[:, None]
            nothing_NxV = jnp.zeros((count, state.seen.shape[1]), bool)
            return nothing_NxV.at[jnp.arange(count)[:, None], tokens_NxP].max(stand_NxP)

        here_B = _here(state, index_N)[:, None]
        asked, seen = (_to_rows(state, in_context(each)) for each in (row_N.start, row_N.length))
        state = dataclasses.replace(
            state, asked=jnp.where(here_B, asked, state.asked), seen=jnp.where(here_B, seen, state.seen)
        )
    return _begin(state, row_N, index_N)


@functools.partial(jax.jit, donate_argnames="state")
def admit_again(state: State, source_N, seed_N, index_N) -> State:
    """In each of `N` parts of the rows gives the row at `index` the prompt of the one at `source`, which may be itself,
    without reading it anew; nothing happens where `index` is -1.

    Not for a plan with a penalty, which would have to know what both began with.
    """
    state = dataclasses.replace(state, cache=state.cache.copy_prompts(source_N, index_N))

    def of_source(field_B):
        return jnp.take_along_axis(field_B.reshape(len(source_N), -1), source_N[:, None], axis=1)[:, 0]

    row_N = jax.tree.map(of_source, state.row)
    return _begin(state, dataclasses.replace(row_N, seed=seed_N), index_N)


def _begin(state: State, row_N: Row, index_N) -> State:
    """Every prompt is read but for its last token, which the loop feeds first: logits are computed in one place."""
    here_B = _here(state, index_N)

    def put(field_B, value_N):
        return jnp.where(here_B, _to_rows(state, value_N), field_B)

    return dataclasses.replace(
        state,
        cache=state.cache.back_to(_to_rows(state, row_N.length - 1), here_B),
        row=jax.tree.map(put, state.row, row_N),
        token=put(state.token, row_N.last),
        count=jnp.where(here_B, 0, state.count),
        resets=jnp.where(here_B, 0, state.resets),
        done=jnp.where(here_B, False, state.done),
    )


def _here(state: State, index_N: jax.Array) -> jax.Array:
    """bool `[B]`: the rows at these indices of their parts."""
    rows = len(state.done) // len(index_N)
    return (jnp.arange(rows) == index_N[:, None]).reshape(-1)


def _to_rows(state: State, value_N: jax.Array) -> jax.Array:
    """`[B, ...]`: what each part of the rows has, for each of its rows."""
    return jnp.repeat(value_N, len(state.done) // len(value_N), axis=0)


@functools.partial(jax.jit, static_argnames=SETTINGS, donate_argnames="state")
def decode(
    graph: nnx.GraphDef,
    params,
    layers,
    state: State,
    knobs: Knobs,
    cancelled_B,
    steps,
    until_one_is_done,
    plan: Plan,
) -> tuple[State, Written]:
    """Writes until every row is done, or for `steps` steps, or until one more is done where that is asked.

    layers:      the model's layers apart, where the cache has them so; else None
    cancelled:   bool `[B]`, rows that write no more
    """
    model = nnx.merge(graph, params)
    state = dataclasses.replace(state, done=state.done | cancelled_B)
    was_done_B = state.done
    rows = len(state.done)
    nothing_BxC = jnp.zeros((rows, plan.steps), jnp.int32)
    chances_BxC = nothing_BxC.astype(jnp.float32) if plan.log_probs else None
    written = Written(nothing_BxC, chances_BxC, chances_BxC if plan.reset_id is not None else None)

    def goes_on(carry):
        step, state, _ = carry
        has_steps = (step < plan.steps) & (step < steps)
        return has_steps & ~jnp.all(state.done) & ~(until_one_is_done & jnp.any(state.done & ~was_done_B))

    def one_step(carry):
        step, state, written = carry
        hidden_Bx1xM, cache = model.extend(state.token[:, None], state.cache, layers)
        logits_BxV = model.logits(hidden_Bx1xM, outputs_first=layers is not None)[:, 0]
        state, *now = _advance(dataclasses.replace(state, cache=cache), logits_BxV, knobs, plan)
        columns = [None if now_B is None else now_B[:, None] for now_B in now]

        def put(all_BxC, column_Bx1):
            return jax.lax.dynamic_update_slice(all_BxC, column_Bx1, (0, step))

        return step + 1, state, jax.tree.map(put, written, Written(*columns))

    _, state, written = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), state, written))
    return state, written


def _advance(state: State, logits_BxV: jax.Array, knobs: Knobs, plan: Plan):
    """One token per row: the state with it, the token, and where the plan asks log-probabilities of it and [RESET]."""
    is_reset_V = jnp.arange(logits_BxV.shape[1]) == (-1 if plan.reset_id is None else plan.reset_id)
    token_B = _choose(state, logits_BxV, is_reset_V, knobs, plan)
    log_prob_B, reset_log_prob_B = None, None
    if plan.log_probs:
        chance_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
        log_prob_B = jnp.take_along_axis(chance_BxV, token_B[:, None], axis=-1)[:, 0]
        if plan.reset_id is not None:
            reset_log_prob_B = chance_BxV[:, plan.reset_id]

    cache, fed_B, resets_B, seen_BxV = state.cache, token_B, state.resets, state.seen
    if plan.penalty:
        seen_BxV |= jnp.arange(logits_BxV.shape[1]) == token_B[:, None]
    if plan.reset_id is not None:
        says_reset_B = (token_B == plan.reset_id) & ~state.done
        resets_B += says_reset_B
        if plan.context != "keep":
            # `resample` feeds the prompt's last token once more, so its slot is among those taken back.
            resample = plan.context == "resample"
            cache = cache.back_to(state.row.start - int(resample), says_reset_B)
            if resample:
                fed_B = jnp.where(says_reset_B, state.row.last_of_prompt, token_B)
            if plan.penalty:
                again_BxV = state.asked if resample else state.asked | is_reset_V
                seen_BxV = jnp.where(says_reset_B[:, None], again_BxV, seen_BxV)
    is_stop_B = jnp.isin(token_B, jnp.asarray(plan.stop_ids))
    state = dataclasses.replace(
        state,
        cache=cache,
        token=fed_B,
        count=state.count + ~state.done,
        resets=resets_B,
        done=state.done | is_stop_B | cache.is_full,
        seen=seen_BxV,
    )
    return state, token_B, log_prob_B, reset_log_prob_B


def _choose(state: State, logits_BxV, is_reset_V, knobs: Knobs, plan: Plan) -> jax.Array:
    """One token per row, int32 `[B]`, by each row's own random numbers."""
    logits_BxV = without(logits_BxV, plan.unused_ids)
    if plan.penalty:
        logits_BxV = penalise(logits_BxV, state.seen, knobs.penalty)
    if plan.reset_id is not None:
        last = knobs.reset_bias.shape[1] - 1
        place_B = jnp.clip(state.cache.position - state.row.start, 0, last)
        rows = len(place_B)
        bias_BxT = jnp.broadcast_to(knobs.reset_bias, (rows, last + 1))
        bias_B = jnp.take_along_axis(bias_BxT, place_B[:, None], axis=1)[:, 0]
        bias_B = jnp.where(state.resets < knobs.max_resets, bias_B, -jnp.inf)
        logits_BxV += jnp.where(is_reset_V, bias_B[:, None], 0)
    if plan.greedy:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV /= knobs.temperature
    if plan.top_k:
        logits_BxV = keep_top_k(logits_BxV, plan.top_k)
    if plan.top_p:
        logits_BxV = keep_top_p(logits_BxV, knobs.top_p)
    if plan.min_p:
        logits_BxV = keep_min_p(logits_BxV, knobs.min_p)
    keys_B = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(state.row.seed, state.count)
    return draw(logits_BxV, jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B))
