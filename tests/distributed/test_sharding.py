"""What lies where on a mesh, and that a mesh changes no number: on eight virtual devices, in processes of their own."""

import jax
import pytest
from jax.sharding import PartitionSpec

from jax_backtrack.distributed.mesh import MESH_AXES, logical_to_spec, make_mesh, param_shardings
from jax_backtrack.errors import InputError
from tests import processes, tiny

COMMON = """
import sys, jax, numpy as np
from flax import nnx
from jax_backtrack.models import lora
from jax_backtrack.models.transformer import Compute, Transformer
from jax_backtrack.models.attention.pallas.tree_attention import BlockSizes
from jax_backtrack.distributed.mesh import make_mesh, param_shardings, rows_sharding
from jax_backtrack.training.step import Batch, TrainConfig, batch_gradients, compile_step, init_state
from jax_backtrack.backtracking.trees import Example, TreeSpec, build_tree, draw_cuts, pack, stack
from tests import tiny

ROWS, LENGTH = 16, 32

def batch_of(objective):
    rng = np.random.default_rng(0)
    recipe = TreeSpec(objective, True, "rewind", tiny.RESET_ID)
    rows = []
    for _ in range(ROWS):
        prompt, chosen, rejected = (rng.integers(5, 60, rng.integers(2, 5)).astype(np.int32) for _ in range(3))
        rejected[0] = 5 + (chosen[0] - 4) % 50
        example = Example(prompt, chosen, rejected, True)
        rows.append(pack([build_tree(example, recipe, draw_cuts(example, rng))], LENGTH))
    return Batch(stack(rows), rng.standard_normal((ROWS, LENGTH, 2)).astype(np.float32))

def on_mesh(mesh, shape, with_adapters=False, **how):
    config = tiny.config(**shape)
    model = tiny.model(compute=Compute(mesh=mesh, **how), **shape)
    params = nnx.state(model, nnx.Param)
    places = param_shardings(model, mesh)
    values = [jax.device_put(leaf, place) for leaf, place in zip(*map(jax.tree.leaves, (params, places)), strict=True)]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(params), values))
    if with_adapters:
        lora.add_adapters(model, rank=2, alpha=4.0, targets=lora.TARGETS, reset_id=tiny.RESET_ID)
        trained = nnx.state(model, lora.Adapter)
        nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.1, trained))
    return model

def plan(objective, grad_accumulation_steps=1):
    return TrainConfig(objective, 0.1, 0.5, 4, 1e-3, 1, 0.0, 1.0, 8, tiny.RESET_ID, grad_accumulation_steps)
"""

# Widths that divide by 8 along every axis of the mesh.
SHAPE = "dict(vocab_size=64, num_attention_heads=8, num_key_value_heads=8, **tiny.FAMILIES[family])"

EQUAL = f"""
family, objective = sys.argv[1:3]
shape = {SHAPE}
batch = batch_of(objective)

def gradients(mesh, grad_accumulation_steps=1, **how):
    model = on_mesh(mesh, shape, **how)
    graph, trained, frozen = lora.split(model)
    put = jax.device_put(batch, rows_sharding(mesh))
    places = jax.tree.map(lambda leaf: leaf.sharding, trained)
    compute_gradients = jax.jit(batch_gradients(graph, plan(objective, grad_accumulation_steps), places))
    made, metrics = compute_gradients(trained, frozen, put)
    same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), made, places)
    assert jax.tree.all(same), "gradients come out where their parameters lie"
    return jax.device_get((made, metrics))

def check(name, ours, right):
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(right), strict=True):
        error = np.abs(one - other).max() / max(np.abs(other).max(), 1e-3)
        assert error < 1e-5, (name, jax.tree_util.keystr(path), error)

one, mixed = make_mesh(1, 1, 1, devices=jax.devices()[:1]), make_mesh(2, 2, 2)
alone = gradients(one)
if family == "llama":
    for sizes in (8, 1, 1), (1, 8, 1), (1, 1, 8):
        check(sizes, gradients(make_mesh(*sizes)), alone)
else:
    check("accumulated", gradients(make_mesh(1, 4, 2), grad_accumulation_steps=2), alone)
    check("kernel", gradients(mixed, attention="pallas", blocks=BlockSizes(LENGTH, LENGTH)), alone)
    check("blocks", gradients(mixed, attention="blockwise", blocks=BlockSizes(8, 4)), alone)
    check("adapters", gradients(mixed, with_adapters=True), gradients(one, with_adapters=True))
"""

PLACES = """
from jax_backtrack.models.kv_cache import Cache
from jax_backtrack.sampling import loop
from jax_backtrack.sampling.settings import StaticParams

mesh = make_mesh(data=2, fsdp=2, tensor=2)
graph, params, frozen = lora.split(on_mesh(mesh, dict(vocab_size=64)))
train_config = plan("sft", grad_accumulation_steps=2)
state = init_state(jax.tree.map(lambda leaf: leaf.copy(), params), train_config)
places = jax.tree.map(lambda leaf: leaf.sharding, state)
spread = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1 and not leaf.sharding.is_fully_replicated]
assert len(spread) >= 2 * 7, "moments lie where their parameters do"

batch = jax.device_put(batch_of("sft"), rows_sharding(mesh))
train_step = compile_step(graph, train_config, state)
for _ in range(3):
    state, _ = train_step(state, frozen, batch)
assert train_step._cache_size() == 1, "one compilation"
same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state, places)
assert jax.tree.all(same), "a step leaves everything where it was"

sampling = StaticParams("rewind", 3, (2,))
keys = loop.init_decode_state(Cache, tiny.config(), mesh, sampling, 4, 8, 4, "float32").cache.keys
_, rows, heads, _, _ = keys.sharding.shard_shape(keys.shape)
assert (rows, heads) == (1, 1), "each device holds its own rows and heads of the cache"
"""


def run(program: str, *arguments: str) -> None:
    process = processes.start("-c", COMMON + program, *arguments, devices=8)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.parametrize("family,objective", [("llama", "dpo"), ("gemma2", "sft")])
def test_eight_devices_compute_what_one_computes(family, objective):
    """Loss, metrics and every gradient, to 1e-5 in float32, along each axis of the mesh and along all of them."""
    run(EQUAL, family, objective)


def test_state_rows_and_cache_are_spread_over_eight_devices():
    run(PLACES)


def test_two_axes_never_claim_one_mesh_axis():
    assert logical_to_spec("MxF") == PartitionSpec("fsdp", "tensor")
    assert logical_to_spec("VxM", "projected") == PartitionSpec(("fsdp", "tensor"), None)
    with pytest.raises(InputError, match="two axes of NxF"):
        logical_to_spec("NxF")


@pytest.mark.parametrize(
    "sizes,message",
    [
        ((1, 1, 2), "needs 2 devices, 1 are here"),
        ((-1, 1, -1), "one of them may be -1"),
        ((0, 1, 1), "sizes are at least 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_numbers(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(*sizes, devices=jax.devices()[:1])


def test_an_axis_that_does_not_divide_is_refused_with_the_numbers():
    mesh = jax.sharding.AbstractMesh((1, 1, 4), MESH_AXES)
    with pytest.raises(InputError, match=r"axis K of 2 does not divide by mesh\.tensor = 4"):
        param_shardings(tiny.model(vocab_size=64), mesh)
    mesh = jax.sharding.AbstractMesh((1, 8, 1), MESH_AXES)
    with pytest.raises(InputError, match=r"axis V of 61 does not divide by mesh\.fsdp x mesh\.tensor = 8"):
        param_shardings(tiny.model(), mesh)
