"""Sampling on eight virtual devices writes what one device writes, with weights where training keeps them."""

import pytest

from tests import processes

EQUAL = """
import sys, dataclasses, jax, numpy as np
from flax import nnx
from jax_backtrack.models import lora
from jax_backtrack.models.transformer import Compute
from jax_backtrack.sampling.batching import Request
from jax_backtrack.sampling.settings import StaticParams
from jax_backtrack.distributed.mesh import make_mesh, param_shardings
from tests import tiny
from tests.decoding import engine, sample, traced

family = sys.argv[1]
# Widths that divide by 8 along every axis of the mesh.
shape = dict(tiny.FAMILIES[family], vocab_size=64, num_attention_heads=8, num_key_value_heads=8)
rng = np.random.default_rng(0)
draw = lambda: rng.integers(5, 64, rng.integers(2, 8), dtype=np.int32)
requests = [Request(number, draw(), draw()[: number % 3], seed=number) for number in range(20)]

def written(mesh, context, *how):
    model = tiny.model(seed=4, compute=Compute(mesh=mesh), **shape)
    params = nnx.state(model, nnx.Param)
    values = map(jax.device_put, jax.tree.leaves(params), jax.tree.leaves(param_shardings(model, mesh)))
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(params), list(values)))
    if family == "gemma2":
        lora.add_adapters(model, rank=2, alpha=4.0, targets=lora.TARGETS, reset_id=tiny.RESET_ID)
        nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.01, nnx.state(model, lora.Adapter)))
    plan = StaticParams(context, tiny.RESET_ID, (tiny.EOT_ID,), logprobs=True, used=frozenset({"temperature", *how}))
    turned = traced(bias=2.0, temperature=1.5, top_p=0.9, repetition_penalty=1.2)
    return sample(engine(model, plan, turned, unstacked=False), requests, 8, 9, prompt=12)

one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
context, how = ("rewind", ()) if family == "llama" else ("keep", ("top_p", "repetition_penalty"))
alone = written(one, context, *how)
assert any(tiny.RESET_ID in row for row in alone)
for sizes in sys.argv[2:]:
    assert written(make_mesh(*map(int, sizes.split("x"))), context, *how) == alone, sizes
"""


@pytest.mark.parametrize("family,meshes", [("llama", ["8x1x1", "1x8x1", "1x1x8"]), ("gemma2", ["2x2x2"])])
def test_eight_devices_write_what_one_writes(family, meshes):
    process = processes.start("-c", EQUAL, family, *meshes, devices=8)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
