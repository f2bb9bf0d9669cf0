"""Layers one by one, as decoding on a CPU reads them.

There a scan over stacked layers copies each layer's weights before it multiplies by them, which costs more than the
product of one token does.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jax_backtrack.models.lora import WEIGHTS


def apart(model) -> list[nnx.State]:
    """The parameters of every layer by itself, with axes of outputs first: a second copy of them.

    For `Transformer.extend` with a cache whose layers are apart. Adapters must have been merged.
    """
    stacked = nnx.state(model.blocks)
    return [_one_layer(stacked, number) for number in range(model.config.num_hidden_layers)]


@jax.jit
def _one_layer(stacked: nnx.State, number) -> nnx.State:
    def take(path, leaf):
        layer = leaf[...][number]
        inputs = WEIGHTS.get(path[-1], 0)
        return leaf.replace(jnp.moveaxis(layer, range(inputs), range(-inputs, 0)))

    return nnx.map_state(take, stacked)
