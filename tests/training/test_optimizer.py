"""AdamW with moments in fewer bits: what it keeps, and how far it strays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_backtrack.training.optimizer import adamw, reset_rows_faster


def run(optimizer, steps: int = 30):
    """Parameters after some steps on a fixed sequence of gradients, and the optimizer's state."""
    rng = np.random.default_rng(0)
    params = {"w_MxF": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32), "scale_M": jnp.ones(8)}
    state = optimizer.init(params)
    for _ in range(steps):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_in_float32_it_is_that_of_optax():
    mask = {"w_MxF": True, "scale_M": False}
    ours, _ = run(adamw(1e-2, 0.1, "float32", "float32"))
    theirs, _ = run(optax.adamw(1e-2, b2=0.95, weight_decay=0.1, mask=mask))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("first,second", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_moments_in_bfloat16_stay_close(first, second):
    """30 steps of 1e-2 move a parameter by up to 0.3; rounding the moments to 8 bits, by a hundredth of that."""
    exact, _ = run(adamw(1e-2, 0.0, "float32", "float32"))
    rounded, state = run(adamw(1e-2, 0.0, first, second))
    kept = state[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept.mu)} == {first}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(kept.nu)} == {second}
    errors = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), exact, rounded)
    assert 0 < max(jax.tree.leaves(errors)) < 3e-3


def test_the_rows_of_reset_alone_move_faster():
    rng = np.random.default_rng(1)
    shapes = {"embedding_VxM": (6, 4), "head_VxM": (6, 4), "gate_MxF": (6, 4), "row_adapters": (4,)}
    updates = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    faster, _ = reset_rows_faster(3, 10.0).update(updates, optax.EmptyState(), None)
    for name in ("embedding_VxM", "head_VxM"):
        np.testing.assert_array_equal(faster[name][3], 10 * updates[name][3])
        np.testing.assert_array_equal(np.delete(faster[name], 3, 0), np.delete(updates[name], 3, 0))
    np.testing.assert_array_equal(faster["gate_MxF"], updates["gate_MxF"])
    np.testing.assert_array_equal(faster["row_adapters"], 10 * updates["row_adapters"])
