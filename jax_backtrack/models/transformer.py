"""A decoder-only transformer, read from top to bottom: configuration, block, model.

Letters in names are axes: B rows, S tokens of a row or slots of the cache, T query tokens, L layers, M model width,
N query heads, K key-value heads, D head dimension, F feed-forward width, V vocabulary. The layers' parameters are
stacked along L and scanned.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jax_backtrack import trees
from jax_backtrack.models.attention import attend
from jax_backtrack.models.cache import Cache
from jax_backtrack.models.linear import linear
from jax_backtrack.models.rope import rope_angles, rotate


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of the model. Field names are those of Hugging Face configurations; sizes are in units of features."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Compute:
    """How, not what, the model computes.

    dtype: of the activations
    remat: recompute each layer in the backward pass instead of keeping its activations
    rows:  where the rows of a batch lie; left alone, fully sharded parameters would pull the activations along their
           own axes and put every row on every device
    """

    dtype: str = "float32"
    remat: bool = False
    rows: NamedSharding | None = None


class RMSNorm(nnx.Module):
    """Root mean square normalisation in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, features: int, eps: float, param_dtype):
        self.scale_M = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x_BxTxM: jax.Array) -> jax.Array:
        x32 = x_BxTxM.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x_BxTxM.dtype) * self.scale_M[...].astype(x_BxTxM.dtype)


class Block(nnx.Module):
    """One layer: attention and a gated feed-forward network, each behind a norm and added to the stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype):
        width, hidden, dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def normal(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * 0.02)

        self.attention_norm = RMSNorm(width, config.rms_norm_eps, param_dtype)
        self.query_MxNxD = normal(width, heads, dim)
        self.key_MxKxD = normal(width, kv_heads, dim)
        self.value_MxKxD = normal(width, kv_heads, dim)
        self.out_NxDxM = normal(heads, dim, width)
        self.feed_forward_norm = RMSNorm(width, config.rms_norm_eps, param_dtype)
        self.gate_MxF = normal(width, hidden)
        self.up_MxF = normal(width, hidden)
        self.down_FxM = normal(hidden, width)

    def __call__(self, x_BxTxM, angles, attention):
        """Returns the stream after this layer and what `attention(query, key, value)` returned beside its mix."""
        dtype = x_BxTxM.dtype

        def weight(param):
            return param[...].astype(dtype)

        h = self.attention_norm(x_BxTxM)
        query_BxTxNxD = rotate(linear(h, weight(self.query_MxNxD)), angles)
        key_BxTxKxD = rotate(linear(h, weight(self.key_MxKxD)), angles)
        value_BxTxKxD = linear(h, weight(self.value_MxKxD))
        mixed_BxTxNxD, kept = attention(query_BxTxNxD, key_BxTxKxD, value_BxTxKxD)
        x_BxTxM += jnp.einsum("btnd,ndm->btm", mixed_BxTxNxD, weight(self.out_NxDxM))
        h = self.feed_forward_norm(x_BxTxM)
        gated_BxTxF = jax.nn.silu(linear(h, weight(self.gate_MxF))) * (linear(h, weight(self.up_MxF)))
        return x_BxTxM + gated_BxTxF @ weight(self.down_FxM), kept


class Transformer(nnx.Module):
    """The model: `model(tokens)` gives causal logits; `hidden` scores trees; `extend` grows a cache."""

    def __init__(
        self,
        config: TransformerConfig,
        rngs: nnx.Rngs,
        *,
        param_dtype=jnp.float32,
        compute: Compute = Compute(),
    ):
        self.config = config
        self.compute = compute
        shape = (config.vocab_size, config.hidden_size)
        self.embedding_VxM = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * 0.02)
        make_block = functools.partial(Block, config, param_dtype=param_dtype)
        self.blocks = nnx.vmap(lambda rngs: make_block(rngs=rngs))(rngs.split(config.num_hidden_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype)
        if not config.tie_word_embeddings:
            self.head_VxM = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * 0.02)

    def __call__(self, tokens_BxS: jax.Array) -> jax.Array:
        """Causal logits `[B, S, V]` float32 of plain sequences; entry `t` predicts token `t + 1`."""
        rows = trees.causal(tokens_BxS)
        return self.logits(self.hidden(rows.tokens, rows.position, rows.end))

    def hidden(self, tokens_BxS: jax.Array, position_BxS: jax.Array, end_BxS: jax.Array) -> jax.Array:
        """Final hidden states `[B, S, M]` of token trees, where each token sees its ancestors and itself."""
        visible_BxSxS = trees.attention_rule(position_BxS, end_BxS)

        def attention(query, key, value):
            return attend(query, key, value, visible_BxSxS), None

        angles = self._angles(position_BxS)
        graph, stacked = nnx.split(self.blocks)

        def layer(x_BxSxM, params):
            x_BxSxM, _ = nnx.merge(graph, params)(x_BxSxM, angles, attention)
            return self._by_rows(x_BxSxM), None

        if self.compute.remat:
            layer = jax.checkpoint(layer)
        x_BxSxM, _ = jax.lax.scan(layer, self._embed(tokens_BxS), stacked)
        return self.final_norm(x_BxSxM)

    def extend(
        self, tokens_BxT: jax.Array, position_BxT: jax.Array, cache: Cache, visible_BxTxS: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Feeds `T` tokens of every row into the cache's slots `cursor..cursor + T`; final hidden states and the cache.

        `visible_BxTxS` says which slots each fed token sees; the slots being written count as written.
        """
        angles = self._angles(position_BxT)
        graph, stacked = nnx.split(self.blocks)

        def layer(carry, params_and_index):
            x_BxTxM, cache = carry
            params, index = params_and_index

            def attention(query, key, value):
                grown = cache.write(index, key, value)
                return attend(query, *grown.layer(index), visible_BxTxS), grown

            x_BxTxM, grown = nnx.merge(graph, params)(x_BxTxM, angles, attention)
            return (self._by_rows(x_BxTxM), grown), None

        start = self._embed(tokens_BxT), cache
        (x_BxTxM, cache), _ = jax.lax.scan(layer, start, (stacked, jnp.arange(self.config.num_hidden_layers)))
        return self.final_norm(x_BxTxM), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Projects hidden states `[..., M]` to logits `[..., V]` in float32."""
        head_VxM = self.embedding_VxM if self.config.tie_word_embeddings else self.head_VxM
        return jnp.einsum(
            "...m,vm->...v", hidden, head_VxM[...].astype(hidden.dtype), preferred_element_type=jnp.float32
        )

    def _angles(self, position_BxT):
        return rope_angles(position_BxT, self.config.head_dim, self.config.rope_theta)

    def _embed(self, tokens_BxT):
        return self._by_rows(self.embedding_VxM[...][tokens_BxT].astype(self.compute.dtype))

    def _by_rows(self, x_BxTxM):
        return x_BxTxM if self.compute.rows is None else jax.lax.with_sharding_constraint(x_BxTxM, self.compute.rows)
