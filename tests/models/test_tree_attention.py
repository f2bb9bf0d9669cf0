"""The kernel says what dense attention says, looks at nothing that it need not, and compiles for TPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import process_mask, process_mask_dkv
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_backtrack.aot.compile import compiler_only, devices
from jax_backtrack.backtracking import trees
from jax_backtrack.backtracking.trees import Branch, flatten, pack, tree_attention_mask
from jax_backtrack.errors import InputError
from jax_backtrack.models.attention.dense import attend
from jax_backtrack.models.attention.pallas.tree_attention import (
    RESIDUALS,
    BlockSizes,
    block_map,
    tree_attention,
    visible_blocks,
)
from tests import tiny
from tests.conftest import missing_libtpu

# Programs for a TPU are written into the compilation cache, but cannot be read back where there is none.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
S = 256


def random_branch(rng: np.random.Generator, size: int) -> Branch:
    """A tree of `size` tokens: branches of up to 60 tokens, with whatever is left shared out among children."""
    own = int(rng.integers(1, min(size, 60) + 1))
    children = []
    left = size - own
    while left:
        share = int(rng.integers(1, left + 1))
        children.append(random_branch(rng, share))
        left -= share
    return Branch([5] * own, children=tuple(children))


def random_row(rng: np.random.Generator, length: int = S) -> trees.TokenTrees:
    """Trees side by side, and up to a quarter of padding."""
    left = length - int(rng.integers(0, length // 4))
    packed = []
    while left:
        size = int(rng.integers(1, left + 1))
        packed.append(flatten(random_branch(rng, size)))
        left -= size
    return pack(packed, length)


def random_rows(seed: int, count: int = 2, length: int = S) -> trees.TokenTrees:
    rng = np.random.default_rng(seed)
    return trees.stack([random_row(rng, length) for _ in range(count)])


def causal_rows(length: int, count: int = 1) -> trees.TokenTrees:
    return trees.causal(jnp.zeros((count, length), jnp.int32))


def random_arrays(seed: int, rows: trees.TokenTrees, heads: int, key_heads: int, dim: int, dtype=np.float32) -> tuple:
    """Query, key, value, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    sizes = heads, key_heads, key_heads, heads
    return tuple(jnp.asarray(rng.standard_normal((*rows.tokens.shape, n, dim)), dtype) for n in sizes)


def with_gradients(attention):
    """`attention(query, key, value, position, end)` -> its output and the gradients of query, key and value."""

    def run(query, key, value, dmixed, position, end):
        mixed, pull_back = jax.vjp(lambda *args: attention(*args, position, end), query, key, value)
        return mixed, *pull_back(dmixed.astype(mixed.dtype))

    return jax.jit(run)


@functools.cache
def kernel(blocks: BlockSizes, **how):
    return with_gradients(functools.partial(tree_attention, blocks=blocks, interpret=True, **how))


@functools.cache
def dense(window=None, **how):
    def attention(query, key, value, position, end):
        return attend(query, key, value, tree_attention_mask(position, end, window), **how)

    return with_gradients(attention)


def errors(ours, right) -> list[float]:
    """Largest errors of output and gradients, relative to the largest entry."""
    pairs = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in zip(ours, right, strict=True)]
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]


# heads, key heads, head dimension, blocks, and what is done to the scores
SHAPES = [
    (2, 2, 64, BlockSizes(128, 128), dict()),
    (4, 2, 128, BlockSizes(128, 128), dict(softcap=2.0)),
    (4, 1, 256, BlockSizes(128, 128, heads=2), dict(window=50)),
    (8, 1, 64, BlockSizes(64, 128, heads=2), dict(window=9, softcap=1.0)),
    (6, 2, 128, BlockSizes(128, 32, heads=4), dict(window=200)),
    (2, 1, 256, BlockSizes(512, 512, heads=8), dict(softcap=30.0)),
]


@pytest.mark.parametrize("heads,key_heads,dim,blocks,how", SHAPES)
def test_values_and_gradients_are_those_of_dense_attention(heads, key_heads, dim, blocks, how):
    how = dict(scale=dim**-0.5) | how
    for seed, rows in enumerate([causal_rows(S, 2), *map(random_rows, range(4))]):
        arrays = random_arrays(seed, rows, heads, key_heads, dim)
        ours, right = (run(*arrays, rows.position, rows.subtree_end) for run in (kernel(blocks, **how), dense(**how)))
        assert max(errors(ours, right)) < 1e-4


@settings(max_examples=40)
@given(st.lists(tiny.rooted_trees(), min_size=1, max_size=6))
def test_small_trees_attend_as_dense_attention_does(branches):
    flat = [flatten(branch) for branch in branches]
    assume(sum(tree.length for tree in flat) <= 64)
    rows = trees.stack([pack(flat, 64)])
    arrays = random_arrays(len(flat), rows, 2, 1, 16)
    how = dict(scale=0.5, window=4)
    ours, right = (
        run(*arrays, rows.position, rows.subtree_end) for run in (kernel(BlockSizes(16, 8), **how), dense(**how))
    )
    assert max(errors(ours, right)) < 1e-4


def test_bfloat16_is_as_close_to_float32_as_dense_attention_in_bfloat16():
    how = dict(scale=0.1, softcap=20.0)
    for seed in range(3):
        rows = random_rows(seed)
        arrays = random_arrays(seed, rows, 4, 2, 64, jnp.bfloat16)
        right = dense(**how)(*(array.astype(jnp.float32) for array in arrays), rows.position, rows.subtree_end)
        ours = kernel(BlockSizes(128, 128), **how)(*arrays, rows.position, rows.subtree_end)
        assert [array.dtype for array in ours] == [jnp.bfloat16] * 4
        theirs = errors(dense(**how)(*arrays, rows.position, rows.subtree_end), right)
        for error, dense_error in zip(errors(ours, right), theirs, strict=True):
            assert error < 1.2 * dense_error + 1e-3


def test_nothing_is_read_before_it_is_written():
    """The interpreter that follows a TPU's memories, copies and buffers, with NaN wherever nothing was written yet."""
    rows = random_rows(3, count=2, length=96)
    arrays = random_arrays(3, rows, 2, 1, 64)
    memories = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    attention = functools.partial(tree_attention, scale=0.1, blocks=BlockSizes(32, 32), interpret=memories)
    ours = with_gradients(attention)(*arrays, rows.position, rows.subtree_end)
    right = dense(scale=0.1)(*arrays, rows.position, rows.subtree_end)
    assert max(errors(ours, right)) < 1e-4


@pytest.mark.parametrize("heads,key_heads,dim,blocks,how", SHAPES[:2])
def test_large_scores_make_no_nan(heads, key_heads, dim, blocks, how):
    rows = random_rows(1)
    arrays = tuple(array * 1e4 for array in random_arrays(1, rows, heads, key_heads, dim))
    ours = kernel(blocks, scale=dim**-0.5, **how)(*arrays, rows.position, rows.subtree_end)
    assert all(np.isfinite(array).all() for array in ours)


# ------------------------------------------------------------------------------------------- what is skipped

forked = flatten(Branch([5] * 64, children=(Branch([6] * 64), Branch([7] * 64))))  # a prompt and two branches
side_by_side = pack([flatten(Branch([5] * 128)), flatten(Branch([6] * 64))], S)  # and a block of padding
HIDDEN_BLOCKS = [
    # row, tokens that hold NaN, tokens that must not notice
    (pack([forked], S), slice(64, 128), [slice(0, 64), slice(128, 256)]),
    (side_by_side, slice(0, 128), [slice(128, 256)]),
    (side_by_side, slice(192, 256), [slice(0, 192)]),
]


@pytest.mark.parametrize("row,hidden,others", HIDDEN_BLOCKS)
@pytest.mark.parametrize("window", [None, 100])
def test_blocks_that_nobody_may_see_are_never_read(row, hidden, others, window):
    rows = trees.stack([row])
    clean = random_arrays(0, rows, 4, 2, 64)
    broken = tuple(array.at[:, hidden].set(np.nan) for array in clean)
    run = kernel(BlockSizes(64, 64), scale=0.1, window=window)
    right, ours = (run(*arrays, rows.position, rows.subtree_end) for arrays in (clean, broken))
    # The broken tokens are queries as well, so the keys and values that they see get broken gradients.
    seen = np.asarray(tree_attention_mask(rows.position, rows.subtree_end, window))[0, hidden].any(axis=0)
    for other in others:
        unseen = np.arange(S)[other][~seen[other]]
        for a, b in zip(ours[:2], right[:2], strict=True):
            np.testing.assert_array_equal(a[:, other], b[:, other])
        for a, b in zip(ours[2:], right[2:], strict=True):
            np.testing.assert_array_equal(a[:, unseen], b[:, unseen])


def test_a_row_of_padding_gives_each_token_its_own_value():
    rows = trees.stack([pack([], S)])
    query, key, value, dmixed = random_arrays(0, rows, 4, 2, 64)
    run = kernel(BlockSizes(64, 64), scale=0.1, window=None)
    mixed, dquery, dkey, dvalue = run(query, key, value, dmixed, rows.position, rows.subtree_end)
    np.testing.assert_allclose(mixed, np.repeat(value, 2, axis=2), rtol=1e-6)
    np.testing.assert_allclose(dvalue, dmixed.reshape(1, S, 2, 2, 64).sum(axis=3), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dquery, 0, atol=1e-4)
    np.testing.assert_allclose(dkey, 0, atol=1e-4)


@pytest.mark.parametrize("blocks", [BlockSizes(32, 32), BlockSizes(16, 64), BlockSizes(64, 16), BlockSizes(512, 512)])
@pytest.mark.parametrize("window", [None, 1, 7, 150])
def test_visible_blocks_are_those_with_a_visible_pair(blocks, window):
    for seed in range(6):
        rows = random_rows(seed)
        fitted = blocks.fit(S)
        rule = np.asarray(tree_attention_mask(rows.position, rows.subtree_end, window))
        tiles = rule.reshape(2, S // fitted.query, fitted.query, S // fitted.key, fitted.key)
        visible = np.asarray(visible_blocks(rows.position, rows.subtree_end, window, blocks))
        np.testing.assert_array_equal(visible, tiles.any(axis=(2, 4)))
        map = block_map(rows.position, rows.subtree_end, window, blocks)
        for row in range(2):
            pairs = np.argwhere(visible[row])
            for visits, order in ((map.by_query, pairs), (map.by_key, pairs[np.lexsort(pairs.T)])):
                assert visits.count[row] == len(pairs)
                listed = np.stack([visits.query[row], visits.key[row]], axis=1)
                np.testing.assert_array_equal(listed[: len(pairs)], order)
                assert (listed[len(pairs) :] == order[-1]).all()


@pytest.mark.parametrize("size", [128, 256, 512])
@pytest.mark.parametrize("window", [None, 300])
def test_causal_rows_take_no_more_blocks_than_splash_attention(size, window):
    length = 2048
    rows = causal_rows(length)
    map = block_map(rows.position, rows.subtree_end, window, BlockSizes(size, size))
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    for visits, process in ((map.by_query, process_mask), (map.by_key, process_mask_dkv)):
        info, _ = process(masks.MultiHeadMask([mask]), (size, size))
        assert int(visits.count[0]) <= (np.asarray(info.block_mask) > 0).sum()


# ------------------------------------------------------------------------------------------ where it is used


def test_it_runs_in_a_scan_of_recomputed_layers_under_shard_map_with_a_map_made_once():
    how = dict(scale=0.1, window=50, blocks=BlockSizes(64, 64))
    rows = random_rows(0)
    query, key, value, _ = random_arrays(0, rows, 4, 2, 64)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def loss(attention, query, key, value):
        layer = jax.checkpoint(lambda x, _: (attention(x, key, value), None))
        return jnp.sum(jax.lax.scan(layer, query, length=2)[0] ** 2)

    def sharded(query, key, value):
        # Interpreting a kernel is not possible under check_vma; compiling one for a TPU is.
        along_data = PartitionSpec("data")
        map = block_map(rows.position, rows.subtree_end, how["window"], how["blocks"])
        attention = jax.shard_map(
            lambda *args: tree_attention(*args[:-1], map=args[-1], interpret=True, **how),
            mesh=mesh, in_specs=along_data, out_specs=along_data, check_vma=False,
        )  # fmt: skip
        return attention(query, key, value, rows.position, rows.subtree_end, map)

    def plain(query, key, value):
        return attend(
            query, key, value, tree_attention_mask(rows.position, rows.subtree_end, how["window"]), scale=how["scale"]
        )

    ours, right = (
        jax.jit(jax.grad(functools.partial(loss, attention), (0, 1, 2)))(query, key, value)
        for attention in (sharded, plain)
    )
    assert max(errors(ours, right)) < 1e-4


@pytest.mark.parametrize(
    "changed,message",
    [
        (dict(blocks=BlockSizes(96, 128)), "256 tokens do not split into query blocks of 96"),
        (dict(blocks=BlockSizes(128, 100)), "256 tokens do not split into key blocks of 100"),
        (dict(blocks=BlockSizes(64, 128), interpret=False), "query blocks of 64 tokens: a TPU needs a multiple of 128"),
        (dict(window=0), "window of 0"),
        (dict(key_heads=3), "4 query heads cannot share 3 key heads"),
        (dict(map=(7, BlockSizes(128, 128))), "made for window 7"),
        (dict(map=(None, BlockSizes(64, 128))), "attention runs with window None"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    how = dict(scale=0.1, blocks=BlockSizes(128, 128), interpret=True) | changed
    rows = random_rows(0)
    query, key, value, _ = random_arrays(0, rows, 4, how.pop("key_heads", 2), 64)
    if "map" in how:
        how["map"] = block_map(rows.position, rows.subtree_end, *how["map"])
    with pytest.raises(InputError, match=re.escape(message)):
        tree_attention(query, key, value, rows.position, rows.subtree_end, **how)


# ------------------------------------------------------------------------------------------ the TPU compiler


@functools.cache
def tpu_devices(topology: str) -> list:
    """TPUs that need not be there: libtpu compiles for them."""
    missing_libtpu()
    with compiler_only():
        return devices(topology)


def tpu(topology: str) -> SingleDeviceSharding:
    return SingleDeviceSharding(tpu_devices(topology)[0])


def shapes(sharding, heads=4, key_heads=2, dim=128, length=1024, dtype=jnp.bfloat16) -> list:
    """Query, key, value, position and end of one row."""
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    arrays = [array((1, length, n, dim), dtype) for n in (heads, key_heads, key_heads)]
    return [*arrays, array((1, length), jnp.int32), array((1, length), jnp.int32)]


def compiled_gradient(arguments: list, **how):
    def gradient(query, key, value, position, end):
        mixed, pull_back = jax.vjp(lambda *args: tree_attention(*args, position, end, **how), query, key, value)
        return pull_back(mixed)

    return jax.jit(gradient).lower(*arguments).compile()


KERNELS = ["tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv"]


def kernels_in(compiled) -> list[str]:
    """Names of the kernels that a program for a TPU calls."""
    call = r"%\S*?(tree_attention_\w+?)_*(?:\.\d+)? = .*custom_call_target=\"tpu_custom_call\""
    return re.findall(call, compiled.as_text())


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_forward_and_backward_compile_for_a_tpu(topology, dim):
    assert sorted(kernels_in(compiled_gradient(shapes(tpu(topology), dim=dim), scale=0.1))) == sorted(KERNELS)


@pytest.mark.parametrize("policy,again", [(None, 1), (jax.checkpoint_policies.save_only_these_names(RESIDUALS), 0)])
def test_a_recomputed_layer_can_keep_what_the_forward_kernel_gave(policy, again):
    def gradient(query, key, value, position, end):
        def layer(*args):
            return jnp.sum(jnp.sin(tree_attention(*args, position, end, scale=0.1).astype(jnp.float32)))

        return jax.value_and_grad(jax.checkpoint(layer, policy=policy), (0, 1, 2))(query, key, value)

    compiled = jax.jit(gradient).lower(*shapes(tpu("v5e:1x1"), dim=64)).compile()
    assert sorted(kernels_in(compiled)) == sorted(KERNELS + ["tree_attention_forward"] * again)


@pytest.mark.parametrize(
    "changed,how",
    [
        (dict(dtype=jnp.float32), dict(window=300, blocks=BlockSizes(256, 256))),
        (dict(), dict(softcap=50.0, blocks=BlockSizes(256, 256, heads=2))),
        (dict(length=192), dict()),  # one block that is no multiple of 128
        (dict(heads=9, key_heads=3, dim=64), dict(blocks=BlockSizes(128, 256, heads=3))),  # SmolLM2
    ],
)
def test_other_shapes_compile_too(changed, how):
    compiled_gradient(shapes(tpu("v5e:1x1"), **changed), scale=0.1, **how)


def test_it_compiles_under_shard_map_with_its_checks_on():
    """Rows over one axis of a mesh and heads over the other, as in training."""
    mesh = Mesh(np.asarray(tpu_devices("v5e:2x2")).reshape(2, 2), ("data", "tensor"))
    along_heads, along_data = PartitionSpec("data", None, "tensor"), PartitionSpec("data")

    def gradient(query, key, value, position, end):
        def attention(*args):
            return tree_attention(*args[:-1], scale=0.1, window=300, map=args[-1])

        map = block_map(position, end, 300)
        specs = (along_heads,) * 3 + (along_data,) * 3
        sharded = jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=along_heads)
        mixed, pull_back = jax.vjp(lambda *args: sharded(*args, position, end, map), query, key, value)
        return pull_back(mixed)

    arguments = [
        jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(shapes(None), [along_heads] * 3 + [along_data] * 2, strict=True)
    ]
    assert "tree_attention_backward_dkv" in jax.jit(gradient).lower(*arguments).compile().as_text()


def test_the_compiler_is_told_the_work_of_a_causal_row():
    """Nine products of matrices, over the three blocks of 512 in a causal row of 1,024."""
    cost = compiled_gradient(shapes(tpu("v5e:1x1")), scale=0.1).cost_analysis()
    products = (2 + 3 + 4) * 2 * 128 * 4 * 3 * 512 * 512
    assert products <= cost["flops"] < 1.01 * products
