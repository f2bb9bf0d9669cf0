"""Adapters: they start as nothing, only they are trained, and merging them changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_backtrack.backtracking.trees import Example, TreeSpec, build_tree, draw_cuts, pack, stack
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.models import lora
from jax_backtrack.models.lora import TARGETS, WEIGHTS, add_adapters, merge_adapters
from jax_backtrack.models.transformer import Compute
from jax_backtrack.training.step import Batch, TrainConfig, compile_step, init_state
from tests import tiny

TOKENS = np.random.default_rng(0).integers(5, tiny.VOCAB, (2, 20), dtype=np.int32)
TOKENS[:, 7] = tiny.RESET_ID
SETTINGS = dict(rank=2, alpha=4.0, targets=TARGETS, reset_id=tiny.RESET_ID)


def with_random_adapters(**shape):
    model = tiny.model(**shape)
    add_adapters(model, **SETTINGS)
    rng = np.random.default_rng(1)
    values = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape), nnx.state(model, lora.Adapter))
    nnx.update(model, values)
    return model


@pytest.mark.parametrize("shape", [{}, tiny.GEMMA2, dict(tie_word_embeddings=False)])
def test_new_adapters_change_nothing_and_merged_ones_stay_what_they_were(shape):
    plain = tiny.model(**shape)
    before = plain(TOKENS)
    add_adapters(plain, **SETTINGS)
    np.testing.assert_array_equal(plain(TOKENS), before)

    model = with_random_adapters(**shape)
    adapted = model(TOKENS)
    assert float(jnp.abs(adapted - before).max()) > 0.1 * float(jnp.abs(before).max())
    merge_adapters(model)
    assert not jax.tree.leaves(nnx.state(model, lora.Adapter))
    np.testing.assert_allclose(model(TOKENS), adapted, atol=1e-5 * float(jnp.abs(adapted).max()))


def test_every_weight_of_a_layer_is_a_target_and_its_axes_fit():
    block = tiny.model().blocks
    names = {str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(block, nnx.Param)) if path[-1] != "scale_M"}
    assert names == set(WEIGHTS)
    with pytest.raises(InputError, match="did you mean 'query'"):
        add_adapters(tiny.model(), **(SETTINGS | dict(targets=("querry",))))


def test_a_step_trains_the_adapters_alone():
    """Loss falls, what is frozen is not touched, and [RESET]'s rows are trained."""
    ids = np.arange(5, 13, dtype=np.int32)
    example = Example(ids, ids, ids[::-1].copy(), True)
    recipe = TreeSpec("sft", True, "rewind", tiny.RESET_ID)
    rows = stack([pack([build_tree(example, recipe, draw_cuts(example, np.random.default_rng(0)))], 64)])
    model = tiny.model(compute=Compute(mesh=make_mesh()))
    add_adapters(model, **SETTINGS)
    graph, trained, frozen = lora.split(model)
    before = jax.device_get((trained, frozen))
    plan = TrainConfig("sft", 0.1, 0.0, 8, 1e-2, 1, 0.0, 1.0, 16, tiny.RESET_ID)
    state = init_state(trained, plan)
    step = compile_step(graph, plan, state)
    losses = []
    for _ in range(8):
        state, metrics = step(state, frozen, Batch(rows, np.zeros((1, 64, 2), np.float32)))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], jax.device_get(frozen))
    moved = jax.tree.map(lambda one, other: bool((one != other).any()), before[0], jax.device_get(state.params))
    assert all(jax.tree.leaves(moved))


def test_the_vocabulary_is_left_alone_where_nothing_is_taken_back():
    model = tiny.model()
    add_adapters(model, **(SETTINGS | dict(reset_id=None)))
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, lora.Adapter))}
    assert names == {"blocks"}
