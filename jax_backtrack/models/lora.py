"""Low-rank adapters: small trainable parameters beside frozen ones (LoRA, Hu et al. 2021, arXiv 2106.09685).

A weight `w` acts as `w + scale * a @ b`. `[RESET]` has an untrained row in the frozen vocabulary, so what is added to
that row, in the embedding and in an untied head, is trained beside the adapters.

The library qwix does not serve here (tried: 0.1.8). It adds adapters to the module that is called, and in a scan over
stacked layers that is one layer's, made for the moment; its adapters get another number of layers than the stack has.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_backtrack.distributed.mesh import param_shardings, shard
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.models.assign import assign
from jax_backtrack.models.linear import linear

# Weights of a layer that can have an adapter: their names, and how many of their axes are inputs.
WEIGHTS = {
    "query_MxNxD": 1,
    "key_MxKxD": 1,
    "value_MxKxD": 1,
    "out_NxDxM": 2,
    "gate_MxF": 1,
    "up_MxF": 1,
    "down_FxM": 1,
}
TARGETS = tuple(name.partition("_")[0] for name in WEIGHTS)


class Adapter(nnx.Variable):
    """A parameter that is trained while every `nnx.Param` is frozen. float32, and named by its axes as those are."""


class LowRank(nnx.Module):
    """`x @ a @ b * scale`, the addition to one weight; `a` and `b` are named by its axes and R, the rank."""

    def __init__(self, name: str, a: jax.Array, b: jax.Array, scale: float):
        axes = name.rsplit("_", 1)[1].split("x")
        inputs = WEIGHTS[name]
        self.a_axes, self.b_axes = "x".join([*axes[:inputs], "R"]), "x".join(["R", *axes[inputs:]])
        setattr(self, f"a_{self.a_axes}", Adapter(a))
        setattr(self, f"b_{self.b_axes}", Adapter(b))
        self.scale = scale

    def __call__(self, x: jax.Array, mesh: Mesh | None, apply=linear) -> jax.Array:
        """Returns what is added to the weight's output, in x's dtype; `apply` is `linear` or one of its kind."""
        a, b = self.factors()
        return apply(apply(x, a, self.a_axes, mesh), b, self.b_axes, mesh) * jnp.asarray(self.scale, x.dtype)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """Returns `a` and `b`, stacked along layers where the module is."""
        return getattr(self, f"a_{self.a_axes}")[...], getattr(self, f"b_{self.b_axes}")[...]


class RowAdapter(nnx.Module):
    """The addition to one row of a frozen table, the row of the token `index`."""

    def __init__(self, index: int, row_M: jax.Array):
        self.index = index
        self.row_M = Adapter(row_M)

    def of_embeddings(self, tokens_BxT: jax.Array, dtype: str, mesh: Mesh | None) -> jax.Array:
        """Returns what is added to the tokens' rows, `[B, T, M]`."""
        row_M = shard(self.row_M[...], "M", mesh)
        return jnp.where((tokens_BxT == self.index)[..., None], row_M, 0).astype(dtype)

    def of_logits(self, hidden_BxTxM: jax.Array, vocabulary: int, mesh: Mesh | None) -> jax.Array:
        """Returns what is added to logits of hidden states, `[B, T, V]` float32."""
        added_BxTxM = hidden_BxTxM.astype(jnp.float32) * shard(self.row_M[...], "M", mesh)
        return jnp.where(jnp.arange(vocabulary) == self.index, added_BxTxM.sum(axis=-1, keepdims=True), 0)


def add_adapters(
    model, *, rank: int, alpha: float, targets: Sequence[str], reset_id: int | None = None, seed: int = 0
) -> None:
    """Gives a model adapters that change nothing yet: `a` is random, `b` and the additions to [RESET]'s rows are 0.

    rank, alpha: of the adapters, which are scaled by `alpha / rank`
    targets:     which weights of every layer have one, a selection of `TARGETS`
    reset_id:    token whose rows are trained too; None for none
    Works on abstract models (`nnx.eval_shape`) under that function. Raises InputError for a name that is no target.
    """
    check_targets(targets)

    def make():
        factors = {}
        for number, (name, inputs) in enumerate(WEIGHTS.items()):
            if name.partition("_")[0] in targets:
                layers, *shape = getattr(model.blocks, name).shape
                key = jax.random.fold_in(jax.random.key(seed), number)
                a = jax.random.normal(key, (layers, *shape[:inputs], rank)) / math.sqrt(math.prod(shape[:inputs]))
                factors[name] = LowRank(name, a, jnp.zeros((layers, rank, *shape[inputs:])), alpha / rank)
        tables = ["embedding_VxM"] if model.config.tie_word_embeddings else ["embedding_VxM", "head_VxM"]
        tables = [] if reset_id is None else tables
        return factors, {table: RowAdapter(reset_id, jnp.zeros(model.config.hidden_size)) for table in tables}

    factors, rows = _in_their_places(make, model.compute.mesh)
    model.blocks.adapters, model.row_adapters = nnx.data(factors), nnx.data(rows or None)


def check_targets(targets: Sequence[str]) -> None:
    """Raises InputError for a name that is none of `TARGETS`."""
    for target in targets:
        if target not in TARGETS:
            raise InputError(f"lora.target_modules has {target!r}: {nearest(target, TARGETS)}")


def split(model) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns graph, trained parameters and frozen ones: adapters where there are any, else everything is trained."""
    graph, adapters, params = nnx.split(model, Adapter, nnx.Param)
    return (graph, adapters, params) if jax.tree.leaves(adapters) else (graph, params, adapters)


def merge_adapters(model) -> None:
    """Adds the adapters to their weights, in the weights' dtype, and takes them out of the model."""
    for name, adapter in (model.blocks.adapters or {}).items():
        param = getattr(model.blocks, name)
        assign(param, _merged(param[...], *adapter.factors(), scale=adapter.scale))
    for name, adapter in (model.row_adapters or {}).items():
        param = getattr(model, name)
        table_VxM = param[...]
        row_M = (table_VxM[adapter.index] + adapter.row_M[...]).astype(table_VxM.dtype)
        assign(param, table_VxM.at[adapter.index].set(row_M))
    model.blocks.adapters = model.row_adapters = None


@functools.partial(jax.jit, donate_argnums=0, static_argnames="scale")
def _merged(w: jax.Array, a: jax.Array, b: jax.Array, *, scale: float) -> jax.Array:
    def one_layer(parts):
        w, a, b = parts
        return (w + scale * jnp.tensordot(a, b, 1, precision="highest")).astype(w.dtype)

    return jax.lax.map(one_layer, (w, a, b))


def _in_their_places(make, mesh: Mesh | None):
    """Runs `make` where its parameters are to lie: each device makes its own part."""
    abstract = nnx.eval_shape(make)
    graph, _ = nnx.split(abstract)
    places = None if mesh is None else param_shardings(abstract, mesh, Adapter)
    return nnx.merge(graph, jax.jit(lambda: nnx.split(make())[1], out_shardings=places)())
