"""Attention by blocks and in chunks is dense attention under the rule, gradients too, whatever trees stand in a row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_backtrack.backtracking import trees
from jax_backtrack.backtracking.trees import causal, flatten, pack, stack
from jax_backtrack.models.attention.blockwise import attend_by_blocks, block_mask
from jax_backtrack.models.attention.chunked import Chunks, attend_in_chunks
from jax_backtrack.models.attention.dense import attend
from jax_backtrack.models.attention.pallas.block_map import BlockSizes
from tests import tiny

B, S, N, K, D = 2, 50, 4, 2, 8  # S is no multiple of any block
SCALE = 0.5


def operands(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = (B, S, N, D), (B, S, K, D), (B, S, K, D), (B, S, N, D)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("window", "softcap"))
def dense(query, key, value, position_BxS, end_BxS, cotangent, window, softcap):
    visible = trees.tree_attention_mask(position_BxS, end_BxS, window)
    mixed, back = jax.vjp(lambda *qkv: attend(*qkv, visible, scale=SCALE, softcap=softcap), query, key, value)
    return mixed, *back(cotangent)


@functools.partial(jax.jit, static_argnames=("window", "softcap", "blocks"))
def by_blocks(query, key, value, position_BxS, end_BxS, cotangent, window, softcap, blocks):
    mask = block_mask(position_BxS, end_BxS, window, blocks)
    mixed, back = jax.vjp(lambda *qkv: attend_by_blocks(*qkv, mask, scale=SCALE, softcap=softcap), query, key, value)
    return mixed, *back(cotangent)


@functools.partial(jax.jit, static_argnames=("window", "softcap", "size"))
def in_chunks(query, key, value, position_BxS, end_BxS, cotangent, window, softcap, size):
    chunks = Chunks(position_BxS, end_BxS, window)
    how = dict(scale=SCALE, softcap=softcap, size=size)
    mixed, back = jax.vjp(lambda *qkv: attend_in_chunks(*qkv, chunks, **how), query, key, value)
    return mixed, *back(cotangent)


def assert_same(rows, sizes, window=None, softcap=None, dtype="float32", error=1e-5):
    """`sizes` are those of blocks, or of a chunk."""
    query, key, value, cotangent = operands(dtype)
    arguments = query, key, value, rows.position, rows.subtree_end, cotangent
    ours = (by_blocks if isinstance(sizes, BlockSizes) else in_chunks)(*arguments, window, softcap, sizes)
    for name, one, other in zip("out query key value".split(), ours, dense(*arguments, window, softcap), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        scale = np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(np.asarray(one, np.float32), other, atol=error * scale, err_msg=name)


def rows_of(branches) -> trees.TokenTrees:
    rows, open_trees = [], []
    for tree in map(flatten, branches):
        if sum(each.length for each in open_trees) + tree.length > S:
            rows.append(pack(open_trees, S))
            open_trees = []
        if tree.length <= S:
            open_trees.append(tree)
    rows.append(pack(open_trees, S))
    return stack([rows[0], rows[-1]])


SIZES = [BlockSizes(8, 4), 16]


@pytest.mark.parametrize(
    "sizes, window, softcap",
    [(BlockSizes(8, 4), None, None), (BlockSizes(4, 8), 3, 2.0), (16, None, None), (8, 3, 2.0)],
)
@settings(max_examples=30, deadline=None)
@given(branches=st.lists(tiny.rooted_trees(), min_size=1, max_size=8))
def test_packed_trees_attend_as_densely(branches, sizes, window, softcap):
    assert_same(rows_of(branches), sizes, window, softcap)


@pytest.mark.parametrize("sizes", [*SIZES, 64])
def test_a_plain_sequence_attends_as_densely(sizes):
    assert_same(causal(jnp.zeros((B, S), jnp.int32)), sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_bfloat16_stays_bfloat16_with_sums_in_float32(sizes):
    assert_same(causal(jnp.zeros((B, S), jnp.int32)), sizes, dtype="bfloat16", error=2e-2)


def test_a_query_block_takes_up_no_more_key_blocks_than_it_sees():
    rows = stack([pack([flatten(trees.Branch([first] * 16)) for first in (5, 6, 7)], S)] * B)
    mask = block_mask(jnp.asarray(rows.position), jnp.asarray(rows.subtree_end), None, BlockSizes(8, 4))
    # Every tree of 16 tokens makes two query blocks, which see two and four key blocks; then two tokens of padding.
    assert mask.count.tolist() == [[2, 4] * 3 + [1]] * B
    assert mask.order[0, 3, :4].tolist() == [4, 5, 6, 7]
