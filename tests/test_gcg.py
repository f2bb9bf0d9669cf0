"""GCG's losses and gradients against passes over one sequence at a time, and the search."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_backtrack.errors import InputError
from jax_backtrack.hub.reset import add_reset
from jax_backtrack.safety.gcg import Attack, Objective, Settings
from tests import tiny
from tests.test_tokenizer import small_tokenizer

QUESTION = [{"role": "user", "content": "hello there"}]
SETTINGS = Settings(suffix="a b c d e f", steps=4, width=24, top_k=8, rows=2, row_length=128)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def attacked(request):
    """A tiny model of each family with [RESET], and its tokenizer."""
    tokenizer = small_tokenizer()
    model = tiny.model(seed=2, vocab_size=len(tokenizer.hf), **tiny.FAMILIES[request.param])
    return model, add_reset(model, tokenizer)


def attack(attacked, reset_weight: float = 0.0, **settings) -> Attack:
    model, tokenizer = attacked
    objective = Objective.of(tokenizer, QUESTION, "the end", reset_weight)
    return Attack(model, tokenizer, objective, dataclasses.replace(SETTINGS, **settings))


def one_loss(model, objective: Objective, suffix_TxV: jax.Array) -> jax.Array:
    """Written for itself: one causal pass, with the suffix as one-hot rows."""
    before, after, target = (np.asarray(ids, np.int32) for ids in (objective.before, objective.after, objective.target))
    tokens = np.concatenate([before, np.zeros(len(suffix_TxV), np.int32), after, target])
    index = np.arange(len(tokens), dtype=np.int32)[None]
    place = len(before) + np.arange(len(suffix_TxV))
    table = model.embedding_VxM[...]
    added = jnp.zeros((1, len(tokens), table.shape[1])).at[0, place].set(suffix_TxV @ table - table[0])
    hidden = model.hidden(tokens[None], index, np.full_like(index, len(tokens)), added)
    log_probs = jax.nn.log_softmax(model.logits(hidden)[0])
    first = len(tokens) - len(target) - 1
    loss = -jnp.mean(log_probs[first + np.arange(len(target)), target])
    if objective.reset_weight:
        loss += objective.reset_weight * jnp.mean(log_probs[first:, objective.reset_id])
    return loss


def one_hot(attacked, ids) -> jax.Array:
    return jax.nn.one_hot(np.asarray(ids), attacked[0].config.vocab_size)


@pytest.mark.parametrize("reset_weight", [0.0, 0.7], ids=["plain", "adaptive"])
def test_losses_in_trees_are_those_of_single_sequences(attacked, reset_weight):
    searching = attack(attacked, reset_weight)
    rng = np.random.default_rng(0)
    candidates = np.tile(searching.suffix, (20, 1))
    for number, ids in enumerate(candidates[1:]):  # the first is the suffix itself
        ids[number % len(ids)] = rng.integers(5, 250)
    found = searching.losses(candidates)
    expected = [one_loss(attacked[0], searching._objective, one_hot(attacked, ids)) for ids in candidates]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len(set(np.round(found, 4))) > 15


@pytest.mark.parametrize("reset_weight", [0.0, 0.7], ids=["plain", "adaptive"])
def test_gradients_are_those_by_one_hot_choices(attacked, reset_weight):
    searching = attack(attacked, reset_weight)
    model, suffix_TxV = attacked[0], one_hot(attacked, searching.suffix)
    expected = jax.grad(lambda suffix: one_loss(model, searching._objective, suffix))(suffix_TxV)
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
        Objective((1,), (2,), (3,), reset_weight=1.0)
    with pytest.raises(InputError, match="raise row_length = 16"):
        attack(attacked, row_length=16)
    with pytest.raises(InputError, match="top_k is 100000"):
        attack(attacked, top_k=100000)
    with pytest.raises(InputError, match="starts from is empty"):
        attack(attacked, suffix="")
