"""The sampling loop: prefill, then one `lax.while_loop` in which any row may take its draft back at any step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jax_backtrack.models.cache import Cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the compiled loop depends on; another plan is another compilation.

    new_tokens: steps of the loop, which is the most tokens a row may emit, drafts and resets included
    context:    reset context, "keep" | "rewind" | "resample"
    reset_id:   id of [RESET], or None for a model without it
    stop_ids:   ids that end a reply
    greedy:     take the likeliest token; temperature, top_k and top_p are not looked at
    top_k:      sample among the k likeliest tokens; 0 for all
    nucleus:    cut the distribution to the mass `top_p`
    """

    new_tokens: int
    context: str
    reset_id: int | None
    stop_ids: tuple[int, ...]
    greedy: bool
    top_k: int
    nucleus: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch of prompts, padded on the right.

    tokens:      int32 `[B, P]`, the prompt and behind it the first words of the reply where those are given
    length:      int32 `[B]`, tokens of each row
    reply_start: int32 `[B]`, where the reply begins, which is where a reset returns to
    seed:        uint32 `[B]`, of the row's own random numbers
    real:        bool `[B]`, False for rows that only fill the batch
    """

    tokens: jax.Array
    length: jax.Array
    reply_start: jax.Array
    seed: jax.Array
    real: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Knobs:
    """Numbers that may change without a new compilation.

    temperature, top_p: float32 scalars; max_resets: int32 scalar, after which [RESET] is masked out
    reset_bias: float32, added to the logit of [RESET]; anything that broadcasts to `[B, new_tokens]`
    """

    temperature: jax.Array
    top_p: jax.Array
    max_resets: jax.Array
    reset_bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries.

    step:     int32 scalar, tokens emitted so far by every row that is not done
    cache:    the rows' visible past
    token:    int32 `[B]`, to be fed next, at `position` int32 `[B]`
    emitted:  int32 `[B, new_tokens]`, everything sampled, drafts and resets included
    count:    int32 `[B]`, how much of `emitted` is the row's
    resets:   int32 `[B]`
    done:     bool `[B]`
    """

    step: jax.Array
    cache: Cache
    token: jax.Array
    position: jax.Array
    emitted: jax.Array
    count: jax.Array
    resets: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames=("graph", "plan"))
def generate(graph: nnx.GraphDef, params, prompts: Prompts, knobs: Knobs, plan: Plan) -> State:
    """Samples until every row is done or has emitted `plan.new_tokens` tokens; the state at the end.

    A row's tokens depend on its prompt and seed alone, not on the other rows.
    """
    model = nnx.merge(graph, params)
    rows = prompts.tokens.shape[0]
    row = jnp.arange(rows)
    last_of_prompt_B = prompts.tokens[row, prompts.reply_start - 1]
    bias_BxT = jnp.broadcast_to(knobs.reset_bias, (rows, plan.new_tokens))
    key_B = jax.vmap(jax.random.key)(prompts.seed)

    def step(state: State) -> State:
        logits_BxV, cache = _feed(model, state)
        if plan.reset_id is not None:
            bias_B = jnp.where(state.resets < knobs.max_resets, bias_BxT[:, state.step], -jnp.inf)
            logits_BxV = logits_BxV.at[:, plan.reset_id].add(bias_B)
        token_B = _choose(logits_BxV, key_B, state.step, knobs, plan)

        next_token_B, next_position_B, resets_B = token_B, state.position + 1, state.resets
        if plan.reset_id is not None:
            is_reset_B = (token_B == plan.reset_id) & ~state.done
            resets_B += is_reset_B
            if plan.context != "keep":
                # `resample` feeds the prompt's last token once more, so its slot is among those taken back.
                resample = plan.context == "resample"
                back_to_B = prompts.reply_start - int(resample)
                cache = cache.forget_from(back_to_B, is_reset_B)
                fed_B = last_of_prompt_B if resample else token_B
                next_token_B = jnp.where(is_reset_B, fed_B, token_B)
                next_position_B = jnp.where(is_reset_B, back_to_B, next_position_B)

        is_stop_B = jnp.isin(token_B, jnp.asarray(plan.stop_ids))
        return State(
            step=state.step + 1,
            cache=cache,
            token=next_token_B,
            position=next_position_B,
            emitted=state.emitted.at[:, state.step].set(jnp.where(state.done, 0, token_B)),
            count=state.count + ~state.done,
            resets=resets_B,
            done=state.done | is_stop_B,
        )

    def goes_on(state: State):
        return (state.step < plan.new_tokens) & ~jnp.all(state.done)

    return jax.lax.while_loop(goes_on, step, _prefill(model, prompts, plan))


def _prefill(model, prompts: Prompts, plan: Plan) -> State:
    """Feeds every prompt but for its last token, which the loop feeds first: logits are computed in one place."""
    rows, length = prompts.tokens.shape
    position_BxP = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    live_BxP = position_BxP < prompts.length[:, None] - 1
    cache = Cache.empty(model.config, rows, length + plan.new_tokens, model.compute.dtype, model.compute.mesh)
    cache = cache.claim(position_BxP, live_BxP)
    _, cache = model.extend(prompts.tokens, position_BxP, cache)
    nothing_B = jnp.zeros(rows, jnp.int32)
    return State(
        step=jnp.zeros((), jnp.int32),
        cache=cache.advance(length),
        token=prompts.tokens[jnp.arange(rows), prompts.length - 1],
        position=prompts.length - 1,
        emitted=jnp.zeros((rows, plan.new_tokens), jnp.int32),
        count=nothing_B,
        resets=nothing_B,
        done=~prompts.real,
    )


def _feed(model, state: State) -> tuple[jax.Array, Cache]:
    """Feeds one token per row; logits `[B, V]` of the next, and the cache with the token in it."""
    position_Bx1 = state.position[:, None]
    cache = state.cache.claim(position_Bx1, jnp.ones_like(position_Bx1, bool))
    hidden_Bx1xM, cache = model.extend(state.token[:, None], position_Bx1, cache)
    return model.logits(hidden_Bx1xM)[:, 0], cache.advance(1)


def _choose(logits_BxV: jax.Array, key_B: jax.Array, step: jax.Array, knobs: Knobs, plan: Plan) -> jax.Array:
    """One token per row, int32 `[B]`, by each row's own random numbers of this step."""
    if plan.greedy:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV /= knobs.temperature
    if plan.top_k:
        least_B = jax.lax.top_k(logits_BxV, plan.top_k)[0][:, -1]
        logits_BxV = jnp.where(logits_BxV < least_B[:, None], -jnp.inf, logits_BxV)
    if plan.nucleus:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1, descending=True)
        mass_before_BxV = jnp.cumsum(jax.nn.softmax(sorted_BxV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BxV, axis=-1)
        in_nucleus_BxV = mass_before_BxV < knobs.top_p
        least_B = jnp.min(jnp.where(in_nucleus_BxV, sorted_BxV, jnp.inf), axis=-1)
        logits_BxV = jnp.where(logits_BxV < least_B[:, None], -jnp.inf, logits_BxV)
    noise_BxV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), logits_BxV.shape[1:]))(key_B)
    return jnp.argmax(logits_BxV + noise_BxV, axis=-1).astype(jnp.int32)
