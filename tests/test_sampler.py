"""The sampler equals naive recomputation: every token from scratch on the row's own context, resets included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_backtrack import Sampler
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.loop import Knobs, Plan, Prompts, generate
from tests import tiny

R, E = tiny.RESET_ID, tiny.EOT_ID
NEW, PROMPT = 9, 8
MODELS = {family: nnx.split(tiny.model(seed=4, **fields)) for family, fields in tiny.FAMILIES.items()}
every_family = pytest.mark.parametrize("family", MODELS)
GREEDY = Plan(new_tokens=NEW, context="keep", reset_id=R, stop_ids=(E,), greedy=True, top_k=0, nucleus=False)
causal_logits = jax.jit(lambda graph, params, tokens: nnx.merge(graph, params)(tokens)[0], static_argnums=0)


def prompts(rows: int = 3, seed: int = 0) -> Prompts:
    """Prompts of different lengths; row 1 has the first two tokens of its reply written for it."""
    rng = np.random.default_rng(seed)
    length = rng.integers(4, PROMPT + 1, rows).astype(np.int32)
    reply_start = length.copy()
    reply_start[1 % rows] -= 2
    tokens = rng.integers(5, tiny.VOCAB, (rows, PROMPT), dtype=np.int32)
    return Prompts(tokens, length, reply_start, np.arange(rows, dtype=np.uint32) + 7, np.ones(rows, bool))


def knobs(max_resets=2, bias=0.0, temperature=1.0, top_p=1.0) -> Knobs:
    return Knobs(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(max_resets), jnp.asarray(bias, jnp.float32))


def next_token_logits(context: list[int], family: str) -> np.ndarray:
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(context)] = context
    return np.array(causal_logits(*MODELS[family], padded)[len(context) - 1])


def naive(prompts: Prompts, row: int, plan: Plan, knobs: Knobs, family: str) -> list[int]:
    """One row, one token at a time, each from the logits of a full pass over the row's context. Written for itself."""
    start, length = int(prompts.reply_start[row]), int(prompts.length[row])
    prompt = prompts.tokens[row, :start].tolist()
    context = prompts.tokens[row, :length].tolist()
    bias = np.broadcast_to(np.asarray(knobs.reset_bias), (len(prompts.length), plan.new_tokens))[row]
    emitted, resets = [], 0
    for step in range(plan.new_tokens):
        logits = next_token_logits(context, family)
        logits[R] += bias[step] if resets < knobs.max_resets else -np.inf
        if plan.greedy:
            token = int(logits.argmax())
        else:
            logits = logits / float(knobs.temperature)
            order = np.argsort(-logits)
            if plan.top_k:
                logits[order[plan.top_k :]] = -np.inf
            if plan.nucleus:
                mass = np.exp(logits[order] - logits.max())
                mass /= mass.sum()
                logits[order[np.cumsum(mass) - mass >= float(knobs.top_p)]] = -np.inf
            key = jax.random.fold_in(jax.random.key(prompts.seed[row]), step)
            token = int((logits + np.asarray(jax.random.gumbel(key, logits.shape))).argmax())
        emitted.append(token)
        if token == E:
            break
        if token == R:
            resets += 1
            context = {"keep": [*context, R], "rewind": [*prompt, R], "resample": list(prompt)}[plan.context]
        else:
            context.append(token)
    return emitted


def sampled(prompts: Prompts, plan: Plan, knobs: Knobs, family: str = "llama") -> list[list[int]]:
    state = generate(*MODELS[family], prompts, knobs, plan)
    return [state.emitted[row, : state.count[row]].tolist() for row in range(len(prompts.length))]


def forced_at(*steps_of_rows) -> np.ndarray:
    """A bias that makes row b say [RESET] at exactly the given steps."""
    bias = np.full((len(steps_of_rows), NEW), -1e9, np.float32)
    for row, steps in enumerate(steps_of_rows):
        bias[row, list(steps)] = 1e9
    return bias


@every_family
@pytest.mark.parametrize("context", ["keep", "rewind", "resample"])
@pytest.mark.parametrize("step", range(NEW))
def test_a_reset_at_every_step_equals_naive_recomputation(family, context, step):
    """Rows reset at different times, one of them twice, one of them never. Gemma-2's window is shorter than prompts."""
    plan = dataclasses.replace(GREEDY, context=context)
    asked = prompts()
    forced = knobs(bias=forced_at([step], [(step + 3) % NEW, (step + 5) % NEW], []))
    expected = [naive(asked, row, plan, forced, family) for row in range(3)]
    assert sampled(asked, plan, forced, family) == expected
    assert expected[0].count(R) == (0 if E in expected[0][:step] else 1)


@pytest.mark.parametrize("context", ["keep", "rewind", "resample"])
@pytest.mark.parametrize(
    "family,top_k,top_p", [("llama", 0, 1.0), ("gemma2", 5, 1.0), ("llama", 0, 0.7), ("gemma2", 9, 0.8)]
)
def test_sampling_with_temperature_equals_naive_recomputation(family, context, top_k, top_p):
    plan = dataclasses.replace(GREEDY, context=context, greedy=False, top_k=top_k, nucleus=top_p < 1)
    asked, turned = prompts(rows=4), knobs(bias=3.0, temperature=1.7, top_p=top_p)
    assert sampled(asked, plan, turned, family) == [naive(asked, row, plan, turned, family) for row in range(4)]


def test_max_resets_masks_reset():
    for most in range(4):
        emitted = sampled(prompts(), GREEDY, knobs(max_resets=most, bias=1e9))
        assert [row.count(R) for row in emitted] == [most] * 3
        assert all(row[:most] == [R] * most for row in emitted)


def test_a_row_does_not_depend_on_its_neighbours():
    plan = dataclasses.replace(GREEDY, context="rewind", greedy=False)
    asked = prompts(rows=4)
    others = prompts(rows=4, seed=9)
    bias = forced_at([2], [1], [4], [])
    before = sampled(asked, plan, knobs(bias=bias))
    mixed = jax.tree.map(
        lambda one, other: np.where(np.arange(4).reshape(-1, *[1] * (one.ndim - 1)) == 0, one, other), asked, others
    )
    bias[1:] = forced_at([3, 5], [], [0])
    assert sampled(mixed, plan, knobs(bias=bias))[0] == before[0]


def test_rows_that_only_fill_the_batch_emit_nothing():
    asked = dataclasses.replace(prompts(), real=np.asarray([True, False, True]))
    whole, part = sampled(prompts(), GREEDY, knobs()), sampled(asked, GREEDY, knobs())
    assert part == [whole[0], [], whole[2]]


def test_one_compilation_for_any_number_of_resets():
    plan = dataclasses.replace(GREEDY, context="rewind", new_tokens=NEW - 1)
    before = generate._cache_size()
    for most in range(4):
        for bias in (0.0, 1e9):
            sampled(prompts(seed=most), plan, knobs(max_resets=most, bias=bias))
    assert generate._cache_size() == before + 1


@pytest.fixture(scope="module")
def smollm_shaped():
    """A tiny model with SmolLM2's vocabulary, for SmolLM2's tokenizer."""
    return tiny.model(vocab_size=49152)


def test_drafts_and_reply_are_told_apart(smollm_shaped, reset_tokenizer):
    """With [RESET] forced twice at once, both drafts hold nothing but the prefix, and the reply has no trace of it."""
    sampler = Sampler(smollm_shaped, reset_tokenizer, max_resets=2, reset_bias=1e9, max_new_tokens=6, batch_rows=2)
    replies = sampler(["hello", "there", "you"], prefixes=["Well, I", "", "Sure"])
    assert [reply.drafts for reply in replies] == [("Well, I", ""), ("", ""), ("Sure", "")]
    assert all(reply.resets == 2 and "RESET" not in reply.text and reply.finish == "length" for reply in replies)


def test_the_prefix_is_part_of_a_reply_without_resets(smollm_shaped, reset_tokenizer):
    sampler = Sampler(smollm_shaped, reset_tokenizer, max_resets=0, max_new_tokens=4, batch_rows=2)
    (reply,) = sampler(["hello"], prefixes=["Well, I"])
    assert reply.text.startswith("Well, I") and not reply.drafts


def test_a_model_without_reset_never_resets(smollm_shaped, tokenizer):
    assert tokenizer.reset_id is None
    sampler = Sampler(smollm_shaped, tokenizer, reset_bias=1e9, max_resets=3, max_new_tokens=4, batch_rows=2)
    assert [reply.resets for reply in sampler(["a", "b"])] == [0, 0]


def test_every_special_token_but_reset_ends_a_reply(smollm_shaped, reset_tokenizer):
    stops = Sampler(smollm_shaped, reset_tokenizer)._plan.stop_ids
    assert {0, 1, reset_tokenizer.eot_id} <= set(stops) and reset_tokenizer.reset_id not in stops


def test_replies_come_in_order_and_by_seed_whatever_the_batch(smollm_shaped, reset_tokenizer):
    asked = [f"question {'x ' * (17 * i % 11)}" for i in range(7)]
    settings = dict(temperature=1.0, max_new_tokens=5, max_resets=1)
    alone = [
        Sampler(smollm_shaped, reset_tokenizer, batch_rows=4, **settings)([one], seeds=[seed])[0]
        for seed, one in enumerate(asked)
    ]
    seen = []
    together = Sampler(smollm_shaped, reset_tokenizer, batch_rows=4, **settings)(asked, progress=seen.append)
    assert together == alone and sum(seen) == 7


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"context": "rewnd"}, "did you mean 'rewind'"),
        ({"context": "resample"}, "temperature above 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": 10**6}, "top_k 1000000"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 250}, "exceed the model's 256 positions"),
        ({"max_resets": -1}, "max_resets is -1"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(smollm_shaped, reset_tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        Sampler(smollm_shaped, reset_tokenizer, **settings)(["hello"])


def test_a_context_that_the_model_was_not_trained_for_is_refused(smollm_shaped, reset_tokenizer):
    trained = type(reset_tokenizer)(reset_tokenizer.hf, reset_context="rewind")
    with pytest.raises(InputError, match="trained with 'rewind'"):
        Sampler(smollm_shaped, trained, context="keep")
    Sampler(smollm_shaped, trained, context="resample", temperature=1.0)
