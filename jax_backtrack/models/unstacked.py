"""The model as decoding on one CPU reads it: layers apart, with weights and cache laid out for few tokens.

A scan over stacked layers copies each layer's weights before it multiplies by them there, which costs more than the
product of one token does: without this, a sampler writes little more than half as many tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jax_backtrack.distributed.mesh import platform
from jax_backtrack.models.attention.dense import attend_to_matrices
from jax_backtrack.models.kv_cache import Cache, update
from jax_backtrack.models.linear import linear_outputs_first
from jax_backtrack.models.lora import WEIGHTS
from jax_backtrack.models.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CpuCache(Cache):
    """Holds keys `[B * K, D, S]` and values `[B * K, S, D]` of each layer by itself.

    A CPU multiplies keys by a query slot by slot. As matrices in one row XLA's CPU backend multiplies them where they
    lie; otherwise it copies them, in a batch of one.
    """

    row_axis = 0
    key_slot_axis = -1

    @classmethod
    def empty(cls, config, rows: int, prompt: int, ring: int, dtype, mesh=None) -> "CpuCache":
        slots, pairs, dim = prompt + ring, rows * config.num_key_value_heads, config.head_dim
        layers = range(config.num_hidden_layers)
        keys = tuple(jnp.zeros((pairs, dim, slots), dtype) for _ in layers)
        return cls._of(keys, tuple(jnp.zeros((pairs, slots, dim), dtype) for _ in layers), rows, ring, mesh)

    def write(self, layer: int, key_BxTxKxD: jax.Array, value_BxTxKxD: jax.Array) -> "CpuCache":
        key_BxKxDxT, value_BxKxTxD = key_BxTxKxD.transpose(0, 2, 3, 1), value_BxTxKxD.transpose(0, 2, 1, 3)
        keys, values = list(self.keys), list(self.values)
        keys[layer] = update(keys[layer], key_BxKxDxT.reshape(-1, *key_BxKxDxT.shape[2:]), (0, 0, self._slot))
        values[layer] = update(values[layer], value_BxKxTxD.reshape(-1, *value_BxKxTxD.shape[2:]), (0, self._slot, 0))
        return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

    def attend(self, layer: int, query_BxTxNxD: jax.Array, visible_BxTxS: jax.Array, **scores) -> jax.Array:
        return attend_to_matrices(query_BxTxNxD, *self.layer(layer), visible_BxTxS, **scores)


class CpuDecodeModel(Transformer):
    """A Transformer that extends caches and gives logits, with a second copy of the layers' weights.

    Axes of outputs come first in them. Adapters must have been merged.
    """

    cache_type = CpuCache

    def __init__(self, model: Transformer):
        self.config, self.compute = model.config, model.compute
        self.embedding_VxM, self.final_norm, self.row_adapters = model.embedding_VxM, model.final_norm, nnx.data(None)
        if not self.config.tie_word_embeddings:
            self.head_VxM = model.head_VxM
        graph, stacked = nnx.split(model.blocks)
        layers = range(self.config.num_hidden_layers)
        self.blocks = nnx.data([nnx.merge(graph, _one_layer(stacked, number)) for number in layers])

    def _run_blocks(self, run, carry, windows):
        for number, block in enumerate(self.blocks):
            carry = run(block, number, windows[number % len(windows)], *carry)
        return carry

    def _linear(self, decodes: bool):
        return linear_outputs_first

    def _project(self, hidden_BxTxM: jax.Array, table_VxM: jax.Array) -> jax.Array:
        return linear_outputs_first(hidden_BxTxM, table_VxM, dtype=jnp.float32)


def decode_model(model: Transformer) -> Transformer:
    """Returns the model as decoding reads it best where it is."""
    mesh = model.compute.mesh
    on_one_cpu = platform(mesh) == "cpu" and (mesh is None or mesh.size == 1)
    return CpuDecodeModel(model) if on_one_cpu and model.blocks.adapters is None else model


@jax.jit
def _one_layer(stacked: nnx.State, number) -> nnx.State:
    def take(path, leaf):
        layer = leaf[...][number]
        inputs = WEIGHTS.get(path[-1], 0)
        return leaf.replace(jnp.moveaxis(layer, range(inputs), range(-inputs, 0)))

    return nnx.map_state(take, stacked)
