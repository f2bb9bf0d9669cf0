"""GCG's losses and gradients against passes over one sequence at a time, and the search."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.attacks.gcg import Attack, Objective
from jax_backtrack.hub.reset import add_reset
from tests import processes, tiny
from tests.chat_tokenizers import small_tokenizer
from tests.gcg_search import QUESTION, SETTINGS, attack


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def attacked(request):
    """A tiny model of each family with [RESET], and its tokenizer."""
    tokenizer = small_tokenizer()
    model = tiny.model(seed=2, vocab_size=len(tokenizer.hf), **tiny.FAMILIES[request.param])
    return model, add_reset(model, tokenizer)


def one_loss(model, objective: Objective, suffix_TxV: jax.Array) -> jax.Array:
    """Written for itself: one causal pass, with the suffix as one-hot rows."""
    before, after, target = (np.asarray(ids, np.int32) for ids in (objective.before, objective.after, objective.target))
    tokens = np.concatenate([before, np.zeros(len(suffix_TxV), np.int32), after, target])
    index = np.arange(len(tokens), dtype=np.int32)[None]
    place = len(before) + np.arange(len(suffix_TxV))
    table = model.embedding_VxM[...]
    added = jnp.zeros((1, len(tokens), table.shape[1])).at[0, place].set(suffix_TxV @ table - table[0])
    hidden = model.hidden(tokens[None], index, np.full_like(index, len(tokens)), added)
    logprobs = jax.nn.log_softmax(model.logits(hidden)[0])
    first = len(tokens) - len(target) - 1
    loss = -jnp.mean(logprobs[first + np.arange(len(target)), target])
    if objective.reset_weight:
        loss += objective.reset_weight * jnp.mean(logprobs[first:, objective.reset_id])
    return loss


def one_hot(attacked, ids) -> jax.Array:
    return jax.nn.one_hot(np.asarray(ids), attacked[0].config.vocab_size)


@pytest.mark.parametrize("reset_weight", [0.0, 0.7], ids=["plain", "adaptive"])
def test_losses_behind_what_was_read_are_those_of_single_sequences(attacked, reset_weight):
    searching = attack(attacked, reset_weight)
    rng = np.random.default_rng(0)
    candidates = np.tile(searching.suffix, (20, 1))
    for number, ids in enumerate(candidates[1:]):  # the first is the suffix itself
        ids[number % len(ids)] = rng.integers(5, 250)
    found = searching.losses(candidates)
    loss = jax.jit(lambda suffix: one_loss(attacked[0], searching._objective, suffix))
    expected = [loss(one_hot(attacked, ids)) for ids in candidates]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(set(np.round(found, 4))) > 15


@pytest.mark.parametrize("reset_weight", [0.0, 0.7], ids=["plain", "adaptive"])
def test_gradients_are_those_by_one_hot_choices(attacked, reset_weight):
    searching = attack(attacked, reset_weight)
    model, suffix_TxV = attacked[0], one_hot(attacked, searching.suffix)
    expected = jax.jit(jax.grad(lambda suffix: one_loss(model, searching._objective, suffix)))(suffix_TxV)
    np.testing.assert_allclose(searching.gradients(), expected, atol=1e-4 * np.abs(expected).max())


def test_the_prompt_is_what_the_template_makes_of_the_typed_suffix(attacked):
    searching, (_, tokenizer) = attack(attacked), attacked
    objective = searching._objective
    assert [*objective.before, *objective.after] == tokenizer.render(QUESTION).tolist()
    assert tokenizer.decode(objective.target) == "the end"


def test_candidates_have_one_new_token_each_and_can_be_typed(attacked):
    searching, (_, tokenizer) = attack(attacked, width=64), attacked
    candidates = searching.candidates(searching.gradients())
    assert len(candidates) > 10 and ((candidates != searching.suffix).sum(axis=1) == 1).all()
    assert not np.isin(candidates, list(tokenizer.special_ids)).any()
    assert len(np.unique(candidates, axis=0)) == len(candidates)
    for ids in candidates:
        assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids.tolist()


def test_what_is_measured_is_what_is_sent():
    """Every suffix of the search gives its ids in the rendered prompt, whose end merges with what begins with "r"."""
    question = Question(({"role": "user", "content": "hello the"},), "the end")
    tokenizer = small_tokenizer(ordinary=["er"], merges=[("e", "r")])
    model = tiny.model(seed=2, vocab_size=len(tokenizer.hf))
    tokenizer = add_reset(model, tokenizer)
    assert tokenizer.encode("hello therr").tolist() != [*tokenizer.encode("hello the"), *tokenizer.encode("rr")]
    objective = Objective.of(tokenizer, question.messages, question.target)
    settings = dataclasses.replace(SETTINGS, suffix="rr", width=600, top_k=250)
    searching = Attack(model, tokenizer, objective, settings)
    candidates = searching.candidates(np.zeros((len(searching.suffix), model.config.vocab_size)))
    assert len(candidates) > 100
    for ids in (searching.suffix, *candidates):
        sent = tokenizer.render(question.with_suffix(tokenizer.decode(ids)).messages)
        assert sent.tolist() == [*objective.before, *ids, *objective.after]


def test_the_search_lowers_the_loss_and_is_repeatable(attacked):
    first = attack(attacked)
    (start,) = first.losses(first.suffix[None])
    steps = list(first.run())
    assert len(steps) == SETTINGS.steps and min(step.loss for step in steps) < start
    assert all((np.array(one.suffix) != other.suffix).sum() <= 1 for one, other in itertools.pairwise(steps))
    assert steps == list(attack(attacked).run()) != list(attack(attacked, seed=1).run())
    suffix_TxV = one_hot(attacked, steps[-1].suffix)
    assert float(one_loss(attacked[0], first._objective, suffix_TxV)) == pytest.approx(steps[-1].loss, abs=2e-5)


def test_what_cannot_be_attacked_is_said(attacked):
    _, tokenizer = attacked
    with pytest.raises(InputError, match="target of an attack is empty"):
        Objective.of(tokenizer, QUESTION, "")
    with pytest.raises(InputError, match="needs a model with \\[RESET\\]"):
        Objective((1,), (2,), (3,), (), reset_weight=1.0)
    with pytest.raises(InputError, match=r"take \d+ tokens; the model has 256 positions"):
        attack(attacked, suffix="a b c d e f " * 60)
    with pytest.raises(InputError, match="top_k is 100000"):
        attack(attacked, top_k=100000)
    with pytest.raises(InputError, match="starts from is empty"):
        attack(attacked, suffix="")


ON_A_MESH = """
import jax, numpy as np
from flax import nnx
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.models.transformer import Compute
from jax_backtrack.evaluation.attacks import gcg
from jax_backtrack.distributed.mesh import make_mesh, param_shardings
from tests import tiny
from tests.gcg_search import attack
from tests.chat_tokenizers import small_tokenizer

WIDTHS = dict(num_attention_heads=8, num_key_value_heads=4, hidden_size=32, intermediate_size=64)

def search(mesh):
    tokenizer = small_tokenizer()
    how = Compute(mesh=mesh, attention="blockwise")
    model = tiny.model(seed=2, vocab_size=320, compute=how, **tiny.GEMMA2 | WIDTHS)
    tokenizer = add_reset(model, tokenizer)
    params = nnx.state(model, nnx.Param)
    values = map(jax.device_put, jax.tree.leaves(params), jax.tree.leaves(param_shardings(model, mesh)))
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(params), list(values)))
    return attack(
        (model, tokenizer), reset_weight=0.5, steps=2, width=128, rows=24 // gcg.row_parts(mesh)
    )

one, eight = make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(2, 2, 2)
alone, spread = search(one), search(eight)
gradient = alone.gradients()
np.testing.assert_allclose(spread.gradients(), gradient, atol=1e-4 * np.abs(gradient).max())
candidates = alone.candidates(gradient)
spread.candidates(gradient)  # draws as many random numbers
losses = alone.losses(candidates)
assert len(candidates) > 24 and len(set(np.round(losses, 4))) > 12, (len(candidates), losses)
np.testing.assert_allclose(spread.losses(candidates), losses, atol=1e-5)
steps, steps_spread = (list(attack.run()) for attack in (alone, spread))
assert [step.suffix for step in steps] == [step.suffix for step in steps_spread]

def compiled(attack):
    batch = np.zeros((24, 16), np.int32)
    has_read = gcg.prefill(attack._graph, attack._params, None, attack._spread(batch), "float32")
    looked_at, reset_id = attack._objective.looked_at(16), attack._objective.reset_id
    operands = attack._graph, attack._params, has_read, np.int32(4), attack._spread(batch), looked_at, reset_id
    lowered = gcg._losses.lower(*operands, 24 // attack._parts)
    return lowered.compile()

alone, spread = compiled(alone), compiled(spread)
places = spread.input_shardings[0][3], spread.output_shardings
assert [place.shard_shape((24, 16)[:ndim]) for ndim, place in zip((2, 1), places)] == [(6, 16), (6,)], places
work, share = (program.cost_analysis()["flops"] for program in (alone, spread))
assert share < work / 6, (share, work)
"""


def test_eight_devices_find_what_one_finds_with_their_own_candidates_each():
    process = processes.start("-c", ON_A_MESH, devices=8)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
