"""The fingerprint of parameters: every change of a value or of its place changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_backtrack.utils.fingerprint import fingerprint
from tests import tiny


@pytest.fixture
def params():
    return nnx.state(tiny.model(), nnx.Param)


def changed(params, name, change) -> str:
    """The fingerprint with `change(array)` in place of one parameter; the last part of its path is `name`."""

    def one(path, param):
        return jnp.asarray(change(np.array(param))) if path[-1] == name else param[...]

    return fingerprint(nnx.map_state(lambda path, param: param.replace(one(path, param)), params))


def exchanged(one, other):
    def change(array):
        array[one], array[other] = array[other].copy(), array[one].copy()
        return array

    return change


def one_bit(place, bit):
    def change(array):
        bits = array.view(np.uint32)
        bits[place] ^= np.uint32(1 << bit)
        return array

    return change


def test_the_same_parameters_have_one_fingerprint(params):
    assert (
        fingerprint(params)
        == fingerprint(nnx.state(tiny.model(), nnx.Param))
        != fingerprint(nnx.state(tiny.model(1), nnx.Param))
    )


@pytest.mark.parametrize("bit", [0, 12, 22, 23, 31])
def test_one_bit_changes_it(params, bit):
    assert changed(params, "embedding_VxM", one_bit((5, 7), bit)) != fingerprint(params)
    assert changed(params, "query_MxNxD", one_bit((1, 3, 2, 4), bit)) != fingerprint(params)


@pytest.mark.parametrize(
    "name,one,other",
    [
        ("embedding_VxM", (5, 7), (7, 5)),
        ("embedding_VxM", (5, 7), (6, 7)),
        ("embedding_VxM", 5, 6),
        ("query_MxNxD", (0, 3, 2, 4), (1, 3, 2, 4)),
        ("query_MxNxD", (0, 3, 2, 4), (0, 2, 3, 4)),
        ("query_MxNxD", 0, 1),
    ],
    ids=str,
)
def test_what_changes_places_changes_it(params, name, one, other):
    assert changed(params, name, exchanged(one, other)) != fingerprint(params)


def test_names_and_dtypes_change_it(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert fingerprint(zeros) != fingerprint(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), zeros))
    assert len({fingerprint(nnx.State({name: nnx.Param(jnp.zeros(3))})) for name in "ab"}) == 2


def test_no_fingerprint_of_many_small_changes_occurs_twice():
    arrays = np.zeros((500, 4, 3), np.float32)
    arrays[np.arange(500), 1, 2] = np.arange(500)
    assert len({fingerprint(nnx.State({"a": nnx.Param(jnp.asarray(array))})) for array in arrays}) == 500
