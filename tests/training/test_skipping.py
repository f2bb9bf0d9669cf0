"""A batch that is not finite, or whose gradient is too large, changes nothing but the count of such batches."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from jax_backtrack.backtracking.trees import Example, TreeSpec, build_tree, draw_cuts, pack, stack
from jax_backtrack.distributed.mesh import make_mesh, param_shardings
from jax_backtrack.models.transformer import Compute
from jax_backtrack.training.step import Batch, TrainConfig, compile_step, init_state
from tests import tiny

PLAN = TrainConfig("dpo", 0.1, 0.0, 8, 1e-2, 1, 0.0, 1.0, 16, tiny.RESET_ID)


def batch(seed: int, reference: float = 0.0) -> Batch:
    """Of one backtrack pair and one guard pair; `reference` is what the reference says of the chosen sides."""
    random = np.random.default_rng(seed)
    prompt, chosen, rejected = random.integers(5, tiny.VOCAB, (3, 8), dtype=np.int32)
    example = Example(prompt, chosen, rejected, True)
    recipe = TreeSpec("dpo", True, "rewind", tiny.RESET_ID)
    rows = stack([pack([build_tree(example, recipe, draw_cuts(example, random))], 64)])
    logps = np.zeros((1, 64, 2), np.float32)
    logps[..., 0] = reference
    return Batch(rows, logps)


def run(batches, **changes):
    """The state behind these batches, and the metrics of each."""
    plan = dataclasses.replace(PLAN, **changes)
    model = tiny.model(compute=Compute(mesh=(mesh := make_mesh())))
    graph, params = nnx.split(model)
    state = init_state(jax.device_put(params, param_shardings(model, mesh)), plan)
    step, found = compile_step(graph, plan, state), []
    for one in batches:
        state, metrics = step(state, nnx.State({}), one)
        found.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), found


@pytest.mark.parametrize(("reference", "settings"), [(np.nan, {}), (np.inf, {}), (1e3, {"skip_above_norm": 5.0})])
def test_a_batch_that_is_skipped_is_as_if_it_had_not_been(reference, settings):
    """A margin of the reference's that is far above the model's makes a gradient twice as large as any other here."""
    good = [batch(seed) for seed in range(4)]
    whole, metrics = run([*good[:2], batch(7, reference), *good[2:]], **settings)
    without, others = run(good, **settings)
    assert [each["skipped"] for each in metrics] == [0, 0, 1, 1, 1]
    assert (int(whole.step), int(whole.skipped), int(without.skipped)) == (5, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, (whole.params, whole.opt_state), (without.params, without.opt_state))
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [each[name] for each in metrics[:2] + metrics[3:]] == [each[name] for each in others]


def test_without_a_threshold_a_large_gradient_is_a_batch_like_others():
    state, metrics = run([batch(0), batch(7, 1e3)])
    assert metrics[1]["grad_norm"] > 5 and int(state.skipped) == 0
