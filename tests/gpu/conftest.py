"""The device of the tests in this folder: JAX's default one, which must be a GPU (`make test-gpu`).

GPU_TESTS_ON=cpu runs them on the CPU: so it is known without a GPU that the tests themselves are right.
"""

import os

import jax
import pytest

from jax_backtrack.distributed.mesh import make_mesh


@pytest.fixture(autouse=True)
def on_the_device():
    """Skips a test where the device is not what the tests are for; products of float32 are exact, without TF32."""
    platform, wanted = jax.default_backend(), os.environ.get("GPU_TESTS_ON", "gpu")
    if platform != wanted:
        pytest.skip(f"it needs a GPU, and JAX computes on a {platform} here: make test-gpu")
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def mesh():
    """The device alone."""
    return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture
def cpu_mesh():
    """The CPU alone, to compare with."""
    return make_mesh(1, 1, 1, jax.devices("cpu")[:1])
