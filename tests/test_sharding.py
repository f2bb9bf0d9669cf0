"""What lies where on a mesh: run on four virtual devices, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.sharding import PartitionSpec

from jax_backtrack.errors import InputError
from jax_backtrack.sharding import partition

PROGRAM = """
import jax
import numpy as np
from flax import nnx
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.sampling.loop import Plan, Prompts, _prefill
from jax_backtrack.sharding import make_mesh, rows_sharding
from jax_backtrack.training.step import Batch, StepPlan, compile_step, init_state
from jax_backtrack.trees import Recipe, build_tree, draw_cuts, Example, pack, stack
from tests import tiny
from tests.test_tokenizer import small_tokenizer
import sys

folder = sys.argv[1] + "/model"
mesh = make_mesh(data=2, fsdp=2)
save(tiny.model(vocab_size=320), small_tokenizer(), folder)
model, _ = load(folder, mesh)
graph, params = nnx.split(model)
plan = StepPlan("sft", 0.1, 0.0, 4, 1e-3, 1, 0.0, 1.0, 16, 3)
state = init_state(jax.tree.map(lambda leaf: leaf.copy(), params), plan)
places = jax.tree.map(lambda leaf: leaf.sharding, state)
spread = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim > 1 and not leaf.sharding.is_fully_replicated]
assert len(spread) >= 2 * 7, "moments lie where their parameters do"

ids = np.arange(5, 13, dtype=np.int32)
example = Example(ids, ids, ids[::-1].copy(), True)
tree = build_tree(example, Recipe("sft", True, "rewind", 3, 2), draw_cuts(example, np.random.default_rng(0)))
rows = stack([pack([tree], 64)] * 4)
batch = jax.device_put(Batch(rows, np.zeros((4, 64), np.float32)), rows_sharding(mesh))
train_step = compile_step(graph, plan, state)
for _ in range(3):
    state, _ = train_step(state, nnx.State({}), batch)
assert train_step._cache_size() == 1, "one compilation"
same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, places)
assert jax.tree.all(same), "a step leaves everything where it was"

one = np.ones(4, np.int32)
prompts = Prompts(np.ones((4, 8), np.int32), 8 * one, 8 * one, one.astype(np.uint32), one > 0)
prompts = jax.device_put(prompts, rows_sharding(mesh))
plan = Plan(4, "rewind", 3, (2,), True, 0, False)
keys = jax.jit(lambda params, prompts: _prefill(nnx.merge(graph, params), prompts, plan))(params, prompts).cache.keys
assert keys.sharding.shard_shape(keys.shape)[1] == 1, "each device holds its own rows of the cache"
"""


def test_state_rows_and_cache_are_spread_over_four_devices(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def test_two_axes_never_claim_one_mesh_axis():
    assert partition("MxF") == PartitionSpec("fsdp", "tensor")
    with pytest.raises(InputError, match="two axes of BxSxM"):
        partition("BxSxM")
