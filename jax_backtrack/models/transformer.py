"""A decoder-only transformer, read from top to bottom: configuration, block, model.

Letters in names are axes: B rows, S tokens of a row or slots of the cache, T query tokens, L layers, M model width,
N query heads, K key-value heads, D head dimension, F feed-forward width, V vocabulary. The layers' parameters are
stacked along L and scanned.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jax_backtrack.backtracking import trees
from jax_backtrack.distributed.mesh import shard
from jax_backtrack.models.attention.blockwise import BLOCKS
from jax_backtrack.models.attention.dense import attend_behind, soft_cap
from jax_backtrack.models.attention.pallas.tree_attention import RESIDUALS, BlockSizes
from jax_backtrack.models.attention.tree_attention import attend_within_trees, best_kind, make_mask
from jax_backtrack.models.kv_cache import Cache
from jax_backtrack.models.linear import linear, linear_in_place, look_up, look_up_in_place, project
from jax_backtrack.models.rope import Llama3Scaling, rope_angles, rope_frequencies, rotate

# What the backward pass keeps of a layer, by name. What it does not keep it computes again.
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    "full": jax.checkpoint_policies.nothing_saveable,
}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True)}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and kind of the model. Where Hugging Face configurations have the field, it has its name there.

    model_type:              family, a key of `families.FAMILIES`
    hidden_activation:       of the feed-forward gate, a key of `ACTIVATIONS`
    query_pre_attn_scalar:   attention scores are divided by its square root; the head dimension in most models
    attn_logit_softcapping, final_logit_softcapping: bounds of attention scores and of logits; None for none
    windows:                 sliding window of each layer in positions, the token itself counted, None for no window;
                             one entry per layer of a group, and the layers are so many such groups
    norms_around:            blocks have norms behind attention and feed-forward too, not only before them
    unit_offset:             norms multiply by `1 + scale`, in float32, instead of by `scale`
    scale_embedding:         embeddings are multiplied by the square root of `hidden_size`
    """

    model_type: str
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
    query_pre_attn_scalar: float
    rope_scaling: Llama3Scaling | None = None
    hidden_activation: str = "silu"
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    windows: tuple[int | None, ...] = (None,)
    norms_around: bool = False
    unit_offset: bool = False
    scale_embedding: bool = False


@dataclasses.dataclass(frozen=True)
class Compute:
    """How, not what, the model computes.

    dtype:     of the activations
    remat:     what the backward pass recomputes of a layer: nothing ("none"), all but the products with weights
               ("dots"), all but what the attention kernel made ("attention"), or all ("full")
    mesh:      devices that parameters and rows are spread over (`distributed/mesh.py`); None for one device
    attention: within token trees: "dot_product", "chunked" or "blockwise" in plain JAX, or "pallas" on a TPU. Rows
               that do not split into the blocks, or are no longer than one block, are attended to densely, and so is
               a cache
    blocks:    sizes of the blocks of the last two
    skip_unscored: no logits of a chunk of tokens without a score are computed. This is a branch at run time, for which
               a GPU waits for its host
    """

    dtype: str = "float32"
    remat: str = "none"
    mesh: Mesh | None = None
    attention: str = "dot_product"
    blocks: BlockSizes = BLOCKS
    skip_unscored: bool = True

    @classmethod
    def suited_to(cls, platform: str, **fields) -> "Compute":
        """Returns what suits this kind of device, "cpu", "gpu" or "tpu", where `fields` do not say otherwise."""
        return cls(**(dict(attention=best_kind(platform), skip_unscored=platform != "gpu") | fields))


class RMSNorm(nnx.Module):
    """Root mean square normalisation in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, param_dtype):
        make = jnp.zeros if config.unit_offset else jnp.ones
        self.scale_M = nnx.Param(make((config.hidden_size,), param_dtype))
        self.eps, self.unit_offset = config.rms_norm_eps, config.unit_offset

    def __call__(self, x_BxTxM: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        x32 = x_BxTxM.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        scale_M = shard(self.scale_M[...], "M", mesh)
        if self.unit_offset:
            return (normed * (1 + scale_M.astype(jnp.float32))).astype(x_BxTxM.dtype)
        return normed.astype(x_BxTxM.dtype) * scale_M.astype(x_BxTxM.dtype)


class Block(nnx.Module):
    """One layer: attention and a gated feed-forward network, each normed and added to the stream."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, param_dtype):
        width, hidden, dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads

        def normal(*shape):
            return nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * 0.02)

        self.attention_norm = RMSNorm(config, param_dtype)
        self.query_MxNxD = normal(width, heads, dim)
        self.key_MxKxD = normal(width, kv_heads, dim)
        self.value_MxKxD = normal(width, kv_heads, dim)
        self.out_NxDxM = normal(heads, dim, width)
        self.attention_post_norm = RMSNorm(config, param_dtype) if config.norms_around else None
        self.feed_forward_norm = RMSNorm(config, param_dtype)
        self.gate_MxF = normal(width, hidden)
        self.up_MxF = normal(width, hidden)
        self.down_FxM = normal(hidden, width)
        self.feed_forward_post_norm = RMSNorm(config, param_dtype) if config.norms_around else None
        self.activation = config.hidden_activation
        self.adapters = nnx.data(None)  # name of a weight -> LowRank

    def __call__(self, x_BxTxM, angles, attention, mesh=None, apply=linear):
        """Returns the stream after this layer and what `attention(query, key, value)` returned beside its mix.

        `apply` is `linear` or one of its kind, for few tokens.
        """
        h = self.attention_norm(x_BxTxM, mesh)
        query_BxTxNxD = rotate(self._map(h, "query_MxNxD", mesh, apply), angles)
        key_BxTxKxD = rotate(self._map(h, "key_MxKxD", mesh, apply), angles)
        value_BxTxKxD = self._map(h, "value_MxKxD", mesh, apply)
        mixed_BxTxNxD, cached = attention(query_BxTxNxD, key_BxTxKxD, value_BxTxKxD)
        h = self._map(mixed_BxTxNxD, "out_NxDxM", mesh, apply)
        x_BxTxM += self.attention_post_norm(h, mesh) if self.attention_post_norm else h
        h = self.feed_forward_norm(x_BxTxM, mesh)
        gate_BxTxF = ACTIVATIONS[self.activation](self._map(h, "gate_MxF", mesh, apply))
        h = self._map(gate_BxTxF * self._map(h, "up_MxF", mesh, apply), "down_FxM", mesh, apply)
        x_BxTxM += self.feed_forward_post_norm(h, mesh) if self.feed_forward_post_norm else h
        return shard(x_BxTxM, "BxTxM", mesh, "computed" if apply is linear else "decoded"), cached

    def _map(self, x, name: str, mesh, apply):
        """Returns `x` through the weight of this name, and through its adapter where it has one."""
        mapped = apply(x, getattr(self, name)[...], name.rsplit("_", 1)[1], mesh)
        if self.adapters is not None and name in self.adapters:
            mapped += self.adapters[name](x, mesh, apply)
        return mapped


class Transformer(nnx.Module):
    """The model: `model(tokens)` gives causal logits; `hidden` scores trees; `extend` grows a cache,
    `hidden_behind` goes on from it."""

    cache_type = Cache

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
        make_blocks = nnx.vmap(lambda rngs: make_block(rngs=rngs))
        self.blocks = nnx.split_rngs(splits=config.num_hidden_layers)(make_blocks)(rngs)
        self.final_norm = RMSNorm(config, param_dtype)
        if not config.tie_word_embeddings:
            self.head_VxM = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * 0.02)
        self.row_adapters = nnx.data(None)  # name of a table -> RowAdapter

    def __call__(self, tokens_BxS: jax.Array) -> jax.Array:
        """Returns causal logits `[B, S, V]` float32 of plain sequences; entry `t` predicts token `t + 1`."""
        rows = trees.causal(tokens_BxS)
        return self.logits(self.hidden(rows.tokens, rows.position, rows.subtree_end))

    def hidden(
        self, tokens_BxS: jax.Array, position_BxS: jax.Array, end_BxS: jax.Array, added: jax.Array | None = None
    ) -> jax.Array:
        """Returns final hidden states `[B, S, M]` of token trees, where each token sees its ancestors and itself.

        `added`, `[B, S, M]`, is added to the tokens' rows of the embedding table: for gradients by tokens.
        """
        compute, windows = self.compute, self._windows(tokens_BxS.shape[1])
        masks = {w: make_mask(compute.attention, compute.blocks, position_BxS, end_BxS, w) for w in windows}

        def attention(_index, window, query, key, value, _cache):
            mixed = attend_within_trees(query, key, value, masks[window], mesh=compute.mesh, **self._scores())
            return mixed, None

        x_BxSxM, _ = self._through_layers(tokens_BxS, position_BxS, windows, attention, None, added=added)
        return x_BxSxM

    def extend(self, tokens_BxT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Feeds the next `T` tokens of every row into a cache of `cache_type`, and returns their final hidden states
        and the cache with them.

        For single tokens weights stay where they are kept, and the tokens travel.
        """
        tokens = tokens_BxT.shape[1]
        windows = self._windows(cache.slots)
        visible = {window: cache.visible(tokens, window) for window in windows}
        mesh = self.compute.mesh

        def attention(index, window, query, key, value, cache):
            grown = cache.write(index, key, value)
            query = shard(query, "BxTxNxD", mesh)  # where the cache has its rows
            return grown.attend(index, query, visible[window], **self._scores()), grown

        position_BxT = cache.position[:, None] + jnp.arange(tokens)
        hidden_BxTxM, cache = self._through_layers(tokens_BxT, position_BxT, windows, attention, cache)
        return hidden_BxTxM, cache.advance(tokens)

    def hidden_behind(self, beginning: Cache, kept: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
        """Returns final hidden states `[B, T, M]` of plain sequences that all go on behind the same `kept` tokens.

        `beginning` is a stacked cache that has read these tokens, and maybe more, in every one of its `C` rows, which
        divide `B`; on a mesh one for each part of the rows. It is read where it lies, and not grown.
        """
        mesh, tokens, slots = self.compute.mesh, tokens_BxT.shape[1], beginning.keys.shape[3]
        windows = self._windows(slots + tokens)
        later_T, slot_S = jnp.arange(tokens), jnp.arange(slots)
        behind_TxS, behind_TxT = kept + later_T[:, None] - slot_S, later_T[:, None] - later_T
        visible = {
            window: jnp.concatenate(
                [
                    (slot_S < kept) & (behind_TxS < (window or slots + tokens)),
                    (behind_TxT >= 0) & (behind_TxT < (window or tokens)),
                ],
                axis=1,
            )
            for window in windows
        }

        def attention(index, window, query, key, value, _cache):
            mixed_BxTxNxD = attend_behind(query, key, value, *beginning.layer(index), visible[window], **self._scores())
            return shard(mixed_BxTxNxD, "BxTxNxD", mesh), None

        position_BxT = jnp.broadcast_to(kept + later_T, tokens_BxT.shape)
        hidden_BxTxM, _ = self._through_layers(tokens_BxT, position_BxT, windows, attention, None)
        return hidden_BxTxM

    def logits(self, hidden_BxTxM: jax.Array) -> jax.Array:
        """Projects hidden states `[B, T, M]` to logits `[B, T, V]` in float32, each device to its part of them."""
        name = "embedding_VxM" if self.config.tie_word_embeddings else "head_VxM"
        logits_BxTxV = self._project(hidden_BxTxM, getattr(self, name)[...])
        if self.row_adapters is not None:
            logits_BxTxV += self.row_adapters[name].of_logits(hidden_BxTxM, logits_BxTxV.shape[-1], self.compute.mesh)
        cap = self.config.final_logit_softcapping
        return logits_BxTxV if cap is None else soft_cap(logits_BxTxV, cap)

    def _scores(self) -> dict:
        return dict(scale=self.config.query_pre_attn_scalar**-0.5, softcap=self.config.attn_logit_softcapping)

    def _windows(self, length: int) -> tuple[int | None, ...]:
        """Windows of a group of layers, as far as they tell anything in rows of `length` tokens."""
        telling = tuple(w if w is not None and w < length else None for w in self.config.windows)
        return telling if len(set(telling)) > 1 else telling[:1]

    def _through_layers(self, tokens_BxT, position_BxT, windows, attention: Callable, cache: Cache | None, added=None):
        """Returns final hidden states of the tokens, and the cache after the last layer.

        `attention(index, window, query, key, value, cache)` gives a layer's mix of values, and the cache.
        """
        config, mesh = self.config, self.compute.mesh
        angles = rope_angles(position_BxT, rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
        decodes = cache is not None and tokens_BxT.shape[1] == 1

        def run(block, index, window, x_BxTxM, cache):
            def attention_here(query, key, value):
                return attention(index, window, query, key, value, cache)

            return block(x_BxTxM, angles, attention_here, mesh, self._linear(decodes))

        x_BxTxM = self._embed(tokens_BxT, look_up_in_place if decodes else look_up, added)
        x_BxTxM, cache = self._run_blocks(run, (x_BxTxM, cache), windows)
        return self.final_norm(x_BxTxM, mesh), cache

    def _run_blocks(self, run: Callable, carry: tuple, windows: tuple[int | None, ...]) -> tuple:
        """Runs `run(block, index, window, *carry)` for every layer.

        The scan goes over groups of layers, one layer of a group per entry of `windows`: a window is static.
        """
        policy, size = REMAT[self.compute.remat], len(windows)
        graph, stacked = nnx.split(self.blocks)

        def layer(window, params, index, *carry):
            return run(nnx.merge(graph, params), index, window, *carry)

        def group(carry, params_and_first):
            params, first = params_and_first
            for number, window in enumerate(windows):
                run_layer = functools.partial(layer, window)
                run_layer = jax.checkpoint(run_layer, policy=policy) if policy else run_layer
                carry = run_layer(jax.tree.map(lambda leaf: leaf[number], params), first + number, *carry)  # noqa: B023
            return carry, None

        grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), stacked)
        return jax.lax.scan(group, carry, (grouped, jnp.arange(0, self.config.num_hidden_layers, size)))[0]

    def _linear(self, decodes: bool) -> Callable:
        return linear_in_place if decodes else linear

    def _project(self, hidden_BxTxM: jax.Array, table_VxM: jax.Array) -> jax.Array:
        return project(hidden_BxTxM, table_VxM, self.compute.mesh)

    def _embed(self, tokens_BxT, look_up: Callable, added):
        mesh, dtype = self.compute.mesh, self.compute.dtype
        x_BxTxM = look_up(self.embedding_VxM[...], tokens_BxT, dtype, mesh)
        if self.row_adapters is not None:
            x_BxTxM += self.row_adapters["embedding_VxM"].of_embeddings(tokens_BxT, dtype, mesh)
        if added is not None:
            x_BxTxM += added.astype(dtype)
        if self.config.scale_embedding:
            # transformers rounds the scale to the stream's dtype before it multiplies: 59.75 for 59.87 in bfloat16.
            x_BxTxM *= jnp.asarray(self.config.hidden_size**0.5, x_BxTxM.dtype)
        return x_BxTxM
