"""The jitted parts of sampling: prompts are prefilled and inserted into slots, and a loop writes a token per slot.

In any step any slot may take its draft back, end, and be given another prompt, while the others go on; none of it
compiles anew. A slot's tokens depend on its prompt, its seed and the settings alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_backtrack.distributed.mesh import shard
from jax_backtrack.models.kv_cache import Cache
from jax_backtrack.sampling.logits import apply_repetition_penalty, min_p_mask, sample, top_k_mask, top_p_mask, without
from jax_backtrack.sampling.settings import StaticParams, TracedParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotInfo:
    """Describes what stands in a slot from the start. All are `[B]`, or `[Z]` for slots that are to be filled.

    start:  int32, tokens of the prompt: where the reply begins, which is where a reset returns to
    length: int32, tokens of the prompt and of the first words of the reply where those are given
    last, last_of_prompt: int32, the last of those tokens, and the last of the prompt
    seed:   uint32, of the slot's own random numbers
    """

    start: jax.Array
    length: jax.Array
    last: jax.Array
    last_of_prompt: jax.Array
    seed: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Holds what the loop carries.

    cache:   the slots' visible past
    slot:    what they began with, `[B]`
    token:   int32 `[B]`, to be fed next
    count:   int32 `[B]`, tokens written so far, drafts and resets included
    resets:  int32 `[B]`
    done:    bool `[B]`; a slot that is done or has no prompt yet writes nothing
    prompt_seen, seen: bool `[B, V]`, the tokens of the prompt, and those of the whole context; None without a
             repetition penalty
    """

    cache: Cache
    slot: SlotInfo
    token: jax.Array
    count: jax.Array
    resets: jax.Array
    done: jax.Array
    prompt_seen: jax.Array | None
    seen: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeOutputs:
    """Holds what one call wrote, `[B, static.steps]` each: of a slot as many as its `count` grew by, from the first.

    logprob, reset_logprob: float32, of the token and of [RESET], by the model itself: without bias, temperature,
    penalty and cuts, and with the rows that no token has among what the probabilities sum over, as in training; None
    without `logprobs`
    """

    token: jax.Array
    logprob: jax.Array | None
    reset_logprob: jax.Array | None


@functools.partial(jax.jit, static_argnums=range(8))
def init_decode_state(
    cache_type: type, config, mesh: Mesh | None, static: StaticParams, rows: int, prompt: int, ring: int, dtype: str
) -> DecodeState:
    """Returns a batch in which every slot is done: for prompts of up to `prompt` tokens and replies of `ring`."""
    nothing_B = shard(jnp.zeros(rows, jnp.int32), "B", mesh)
    seen_BxV = (
        shard(jnp.zeros((rows, config.vocab_size), bool), "BxV", mesh) if static.uses("repetition_penalty") else None
    )
    return DecodeState(
        cache=cache_type.empty(config, rows, prompt, ring, dtype, mesh),
        slot=SlotInfo(nothing_B, nothing_B, nothing_B, nothing_B, nothing_B.astype(jnp.uint32)),
        token=nothing_B,
        count=nothing_B,
        resets=nothing_B,
        done=nothing_B == 0,
        prompt_seen=seen_BxV,
        seen=seen_BxV,
    )


@functools.partial(jax.jit, static_argnames=("graph", "dtype"))
def prefill(graph: nnx.GraphDef, params, beginning: Cache | None, tokens_ZxP: jax.Array, dtype: str) -> Cache:
    """Returns the keys and values, in `dtype`, of what `Z` prompts begin with and of their `P` tokens after that.

    beginning: as this gives it for the tokens of the shared prefix; None where there is none
    """
    model = nnx.merge(graph, params)
    count, length = tokens_ZxP.shape
    if beginning is None:
        cache = model.cache_type.empty(model.config, count, 0, length, dtype, model.compute.mesh)
    else:
        cache = beginning.as_prompts(length)
    return model.extend(tokens_ZxP, cache)[1]


@functools.partial(jax.jit, static_argnames="static", donate_argnames="state")
def insert(
    state: DecodeState, prefilled: Cache, tokens_ZxP: jax.Array, slot_Z: SlotInfo, index_Z, static: StaticParams
) -> DecodeState:
    """Inserts `Z` prefilled prompts, padded on the right, into slots.

    The slots lie in `Z` parts, on a mesh one for each part of it. Prompt `z` goes into the slot at `index_Z[z]` of part
    `z`, and nowhere where that is -1. It has its own compilation for every size of batch, which `prefill` has not.
    """
    count, length = tokens_ZxP.shape
    state = dataclasses.replace(state, cache=state.cache.insert_prompts(index_Z, prefilled))
    if static.uses("repetition_penalty"):

        def in_context(tokens_Z):
            stand_ZxP = jnp.arange(length) < tokens_Z[:, None]
            nothing_ZxV = jnp.zeros((count, state.seen.shape[1]), bool)
            return nothing_ZxV.at[jnp.arange(count)[:, None], tokens_ZxP].max(stand_ZxP)

        here_B = _here(state, index_Z)[:, None]
        prompt_seen, seen = (_to_slots(state, in_context(count_Z)) for count_Z in (slot_Z.start, slot_Z.length))
        state = dataclasses.replace(
            state,
            prompt_seen=jnp.where(here_B, prompt_seen, state.prompt_seen),
            seen=jnp.where(here_B, seen, state.seen),
        )
    return _begin(state, slot_Z, index_Z)


@functools.partial(jax.jit, donate_argnames="state")
def clone_slot(state: DecodeState, source_Z, seed_Z, index_Z) -> DecodeState:
    """Copies the prompt of slot `source` into slot `index`, which may be the same, so that it is not prefilled again.

    It does so in each of `Z` parts of the slots; nothing happens where `index` is -1. With a repetition penalty it
    cannot be used: that would have to know what both began with.
    """
    state = dataclasses.replace(state, cache=state.cache.copy_prompts(source_Z, index_Z))

    def of_source(field_B):
        return jnp.take_along_axis(field_B.reshape(len(source_Z), -1), source_Z[:, None], axis=1)[:, 0]

    slot_Z = jax.tree.map(of_source, state.slot)
    return _begin(state, dataclasses.replace(slot_Z, seed=seed_Z), index_Z)


def _begin(state: DecodeState, slot_Z: SlotInfo, index_Z) -> DecodeState:
    """Begins replies. The loop feeds the last token of each prompt first, so that logits are computed in one place."""
    here_B = _here(state, index_Z)

    def put(field_B, value_Z):
        return jnp.where(here_B, _to_slots(state, value_Z), field_B)

    return dataclasses.replace(
        state,
        cache=state.cache.rewind_to(_to_slots(state, slot_Z.length - 1), here_B),
        slot=jax.tree.map(put, state.slot, slot_Z),
        token=put(state.token, slot_Z.last),
        count=jnp.where(here_B, 0, state.count),
        resets=jnp.where(here_B, 0, state.resets),
        done=jnp.where(here_B, False, state.done),
    )


def _here(state: DecodeState, index_Z: jax.Array) -> jax.Array:
    """Returns bool `[B]`: the slots at these indices of their parts."""
    slots = len(state.done) // len(index_Z)
    return (jnp.arange(slots) == index_Z[:, None]).reshape(-1)


def _to_slots(state: DecodeState, value_Z: jax.Array) -> jax.Array:
    """Returns `[B, ...]`: what each part of the slots has, for each of its slots."""
    return jnp.repeat(value_Z, len(state.done) // len(value_Z), axis=0)


@functools.partial(jax.jit, static_argnames=("graph", "static"), donate_argnames="state")
def decode(
    graph: nnx.GraphDef,
    params,
    state: DecodeState,
    traced: TracedParams,
    cancelled_B,
    steps,
    until_one_is_done,
    static: StaticParams,
) -> tuple[DecodeState, DecodeOutputs]:
    """Writes until every slot is done, or for `steps` steps, or until one more is done where that is wanted.

    cancelled: bool `[B]`, slots that write no more
    """
    model = nnx.merge(graph, params)
    state = dataclasses.replace(state, done=state.done | cancelled_B)
    was_done_B = state.done
    rows = len(state.done)
    nothing_BxC = jnp.zeros((rows, static.steps), jnp.int32)
    chances_BxC = nothing_BxC.astype(jnp.float32) if static.logprobs else None
    outputs = DecodeOutputs(nothing_BxC, chances_BxC, chances_BxC if static.reset_id is not None else None)

    def goes_on(carry):
        step, state, _ = carry
        has_steps = (step < static.steps) & (step < steps)
        return has_steps & ~jnp.all(state.done) & ~(until_one_is_done & jnp.any(state.done & ~was_done_B))

    def one_step(carry):
        step, state, outputs = carry
        hidden_Bx1xM, cache = model.extend(state.token[:, None], state.cache)
        logits_BxV = model.logits(hidden_Bx1xM)[:, 0]
        state, *now = _advance(dataclasses.replace(state, cache=cache), logits_BxV, traced, static)
        columns = [None if now_B is None else now_B[:, None] for now_B in now]

        def put(all_BxC, column_Bx1):
            return jax.lax.dynamic_update_slice(all_BxC, column_Bx1, (0, step))

        return step + 1, state, jax.tree.map(put, outputs, DecodeOutputs(*columns))

    _, state, outputs = jax.lax.while_loop(goes_on, one_step, (jnp.int32(0), state, outputs))
    return state, outputs


def _advance(state: DecodeState, logits_BxV: jax.Array, traced: TracedParams, static: StaticParams):
    """Returns the state with one more token per slot, the token, and log-probabilities of it and [RESET] if wanted."""
    is_reset_V = jnp.arange(logits_BxV.shape[1]) == (-1 if static.reset_id is None else static.reset_id)
    token_B = _choose(state, logits_BxV, is_reset_V, traced, static)
    logprob_B, reset_logprob_B = None, None
    if static.logprobs:
        chance_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
        logprob_B = jnp.take_along_axis(chance_BxV, token_B[:, None], axis=-1)[:, 0]
        if static.reset_id is not None:
            reset_logprob_B = chance_BxV[:, static.reset_id]

    cache, fed_B, resets_B, seen_BxV = state.cache, token_B, state.resets, state.seen
    if static.uses("repetition_penalty"):
        seen_BxV |= jnp.arange(logits_BxV.shape[1]) == token_B[:, None]
    if static.reset_id is not None:
        says_reset_B = (token_B == static.reset_id) & ~state.done
        resets_B += says_reset_B
        if static.reset_mode != "keep":
            # `resample` feeds the prompt's last token once more, so its slot is among those taken back.
            resample = static.reset_mode == "resample"
            cache = cache.rewind_to(state.slot.start - int(resample), says_reset_B)
            if resample:
                fed_B = jnp.where(says_reset_B, state.slot.last_of_prompt, token_B)
            if static.uses("repetition_penalty"):
                again_BxV = state.prompt_seen if resample else state.prompt_seen | is_reset_V
                seen_BxV = jnp.where(says_reset_B[:, None], again_BxV, seen_BxV)
    is_stop_B = jnp.isin(token_B, jnp.asarray(static.stop_ids))
    state = dataclasses.replace(
        state,
        cache=cache,
        token=fed_B,
        count=state.count + ~state.done,
        resets=resets_B,
        done=state.done | is_stop_B | cache.is_full,
        seen=seen_BxV,
    )
    return state, token_B, logprob_B, reset_logprob_B


def _choose(state: DecodeState, logits_BxV, is_reset_V, traced: TracedParams, static: StaticParams) -> jax.Array:
    """Returns one token per slot, int32 `[B]`, by each slot's own random numbers."""
    logits_BxV = without(logits_BxV, static.unused_ids)
    if static.uses("repetition_penalty"):
        logits_BxV = apply_repetition_penalty(logits_BxV, state.seen, traced.repetition_penalty)
    if static.reset_id is not None:
        last = traced.reset_bias.shape[1] - 1
        place_B = jnp.clip(state.cache.position - state.slot.start, 0, last)
        rows = len(place_B)
        bias_BxT = jnp.broadcast_to(traced.reset_bias, (rows, last + 1))
        bias_B = jnp.take_along_axis(bias_BxT, place_B[:, None], axis=1)[:, 0]
        bias_B = jnp.where(state.resets < traced.max_resets, bias_B, -jnp.inf)
        logits_BxV += jnp.where(is_reset_V, bias_B[:, None], 0)
    if not static.uses("temperature"):
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV /= traced.temperature
    if static.top_k:
        logits_BxV = top_k_mask(logits_BxV, static.top_k)
    if static.uses("top_p"):
        logits_BxV = top_p_mask(logits_BxV, traced.top_p)
    if static.uses("min_p"):
        logits_BxV = min_p_mask(logits_BxV, traced.min_p)
    keys_B = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(state.slot.seed, state.count)
    return sample(logits_BxV, jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B))
