"""What is counted in compiled programs, against what is known of them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_backtrack.aot.compile import compiler_only, devices
from jax_backtrack.aot.hlo import HloProgram
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from tests.conftest import missing_libtpu

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


@pytest.fixture(scope="module")
def mesh():
    missing_libtpu()
    with compiler_only():
        yield make_mesh(1, 4, 1, devices=devices("v5e:2x2"))


def compiled(mesh, function, *arguments, out=PartitionSpec()) -> HloProgram:
    """The program of a function whose arguments are given as shape, dtype and place."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, at)) for shape, dtype, at in arguments]
    return HloProgram(jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*shapes).compile().as_text())


WHOLE, ROWS = PartitionSpec(), PartitionSpec("fsdp")


def test_a_product_in_a_loop_counts_as_often_as_the_loop_runs(mesh):
    def function(x, w_LxMxM):
        return jax.lax.scan(lambda x, w_MxM: (jnp.tanh(x @ w_MxM), None), x, w_LxMxM)[0]

    program = compiled(mesh, function, ((256, 512), jnp.bfloat16, WHOLE), ((7, 512, 512), jnp.bfloat16, WHOLE))
    assert program.cost().flops == 7 * 2 * 256 * 512 * 512


def test_products_over_several_axes_count_once(mesh):
    """A TPU program writes them as convolutions with padding and dilation; only real entries count."""

    def function(x_BxTxM, w_MxNxD):
        return jnp.einsum("btm,mnd->btnd", x_BxTxM, w_MxNxD)

    program = compiled(mesh, function, ((2, 256, 512), jnp.bfloat16, WHOLE), ((512, 4, 128), jnp.bfloat16, WHOLE))
    assert program.cost().flops == 2 * 2 * 256 * 512 * 4 * 128


def test_of_a_conditions_branches_the_costliest_counts(mesh):
    def function(x, w):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: x @ w, lambda: x)

    program = compiled(mesh, function, ((256, 256), jnp.float32, WHOLE), ((256, 256), jnp.float32, WHOLE))
    assert program.cost().flops == 2 * 256**3


def test_collectives_count_what_a_device_sends(mesh):
    """Of four devices each holds a quarter: gathering sends it three times, reducing sends the three others once."""
    size = 1024 * 512 * 4

    def gather(x):
        return jnp.sin(x)

    moved = compiled(mesh, gather, ((1024, 512), jnp.float32, ROWS)).cost().bytes_by_kind()
    assert moved["all-gather"] == pytest.approx(size * 3 / 4)

    def reduce(x):
        return jnp.sum(x, axis=0)

    moved = compiled(mesh, reduce, ((1024, 512), jnp.float32, ROWS)).cost().bytes_by_kind()
    assert moved["all-reduce"] == pytest.approx(2 * 512 * 4 * 3 / 4)


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_runs(mesh):
    def function(x, w_LxMxM):
        def layer(x, w_MxM):
            whole = jax.lax.with_sharding_constraint(w_MxM, NamedSharding(mesh, WHOLE))
            return jnp.tanh(x @ whole), None

        return jax.lax.scan(layer, x, w_LxMxM)[0]

    weights = PartitionSpec(None, "fsdp")
    program = compiled(mesh, function, ((256, 512), jnp.bfloat16, WHOLE), ((7, 512, 512), jnp.bfloat16, weights))
    assert sum(program.cost().bytes_by_kind().values()) == pytest.approx(7 * 512 * 512 * 2 * 3 / 4, rel=0.01)


def test_what_crosses_slices_counts_by_itself(mesh):
    """The mesh has one slice; here are two, and every chip sends its sum to the other slice."""
    with compiler_only():
        both = make_mesh(-1, -1, 1, devices=devices("v5e:2x2*2"))
        assert dict(both.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
        assert {device.slice_index for device in both.devices[0].flat} == {0}
        rows = PartitionSpec(("data", "fsdp"))
        moved = compiled(both, lambda x: jnp.sum(x, axis=0), ((1024, 512), jnp.float32, rows)).cost().bytes_by_kind()
    assert moved["between slices"] == 512 * 4 and moved["all-reduce"] > 0


def test_what_is_no_program_is_refused():
    with pytest.raises(InputError, match="no ENTRY"):
        HloProgram("HloModule nothing")
