"""One training step: log-probabilities of a batch of trees, a loss, an update. Compiled once per run."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_backtrack.backtracking.losses import dpo_loss, pair_logps, pair_slots, sft_loss
from jax_backtrack.backtracking.trees import TokenTrees
from jax_backtrack.models.logprobs import token_logprobs
from jax_backtrack.training.optimizer import adamw, reset_rows_faster


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the compiled step depends on. The fields are those of the recipe (`configs/base.py`)."""

    objective: str
    beta: float
    rpo_alpha: float
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    logits_chunk_size: int
    reset_id: int | None
    grad_accumulation_steps: int = 1
    mu_dtype: str = "float32"
    nu_dtype: str = "float32"
    reset_embedding_lr_scale: float = 1.0
    skip_above_norm: float = 0.0

    def schedule(self) -> optax.Schedule:
        """Returns linear warm-up to `learning_rate` at update `warmup_steps + 1`, then cosine decay to a tenth at the
        last."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (self.warmup_steps + 1),
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(self.steps - 1, self.warmup_steps + 1),
            end_value=self.learning_rate / 10,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """Returns AdamW behind clipping by the global norm; norms' scales are not decayed."""
        steps = [
            optax.clip_by_global_norm(self.max_grad_norm),
            adamw(self.schedule(), self.weight_decay, self.mu_dtype, self.nu_dtype),
        ]
        if self.reset_id is not None and self.reset_embedding_lr_scale != 1:
            steps.append(reset_rows_faster(self.reset_id, self.reset_embedding_lr_scale))
        return optax.chain(*steps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 scalar, batches so far; skipped: int32 scalar, those of them that changed nothing; params: the
    model's; opt_state: optax's."""

    step: jax.Array
    skipped: jax.Array
    params: nnx.State
    opt_state: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """rows: `[B, S]` token trees; reference: for DPO its two sides of each pair, in the pair's slot, `[B, S, 2]`."""

    rows: TokenTrees
    reference: jax.Array


def state_shardings(params: nnx.State, config: TrainConfig) -> TrainState:
    """Returns where the state lies, for params that have a sharding: moments with their parameters, scalars
    everywhere."""
    shardings = jax.tree.map(lambda param: param.sharding, params)
    everywhere = jax.sharding.NamedSharding(jax.tree.leaves(shardings)[0].mesh, jax.sharding.PartitionSpec())
    opt_state = optax.tree_map_params(
        config.optimizer(),
        lambda _, place: place,
        jax.eval_shape(config.optimizer().init, params),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, everywhere, shardings, opt_state)


def new_state(params: nnx.State, config: TrainConfig) -> TrainState:
    """Returns the state before the first step; traceable."""
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, config.optimizer().init(params))


def init_state(params: nnx.State, config: TrainConfig) -> TrainState:
    """Returns the state before the first step, in its shardings. `params` is donated: it lives on in the state only."""
    make = functools.partial(new_state, config=config)
    return jax.jit(make, out_shardings=state_shardings(params, config), donate_argnums=0)(params)


def compile_step(
    graph: nnx.GraphDef, config: TrainConfig, state: TrainState
) -> Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns the jitted step `(state, frozen, batch) -> (state, metrics)`; it donates the state and leaves it where it
    lies.

    `frozen` are the parameters beside the state's, which are not trained; an empty state where all are. Metrics are
    those of `batch_gradients`, and `grad_norm` (before clipping), `learning_rate`, `scored_tokens` and `skipped`.

    A batch whose loss or gradient is not finite, or whose gradient's norm is above `config.skip_above_norm` (0: any
    norm will do), changes nothing but the counts `step` and `skipped`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    optimizer, gradients_of = config.optimizer(), batch_gradients(graph, config, shardings.params)

    def step(state: TrainState, frozen: nnx.State, batch: Batch):
        gradients, metrics = gradients_of(state.params, frozen, batch)
        norm = optax.tree.norm(gradients)
        usable = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        if config.skip_above_norm:
            usable &= norm <= config.skip_above_norm
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        changed = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(functools.partial(jnp.where, usable), changed, (state.params, state.opt_state))
        skipped = state.skipped + ~usable
        metrics |= {
            "grad_norm": norm,
            "learning_rate": config.schedule()(state.step - state.skipped),
            "scored_tokens": jnp.sum(batch.rows.loss_weights != 0),
            "skipped": skipped,
        }
        return TrainState(state.step + 1, skipped, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))


def batch_gradients(
    graph: nnx.GraphDef, config: TrainConfig, shardings: nnx.State
) -> Callable[[nnx.State, nnx.State, Batch], tuple[nnx.State, dict[str, jax.Array]]]:
    """Returns a traceable function `(params, frozen, batch) -> (gradients, metrics)` of the loss of a whole batch.

    Gradients lie at `shardings`, as their parameters do. The rows are taken in `config.grad_accumulation_steps` parts,
    one after the other; what comes out is the same.

    Metrics are scalars: `loss`, `reset_loss` (mean `-log p` of the [RESET] tokens that are to be said, where there are
    any); for DPO `dpo_loss`, without the part of `rpo_alpha`, and the metrics of that function.
    """

    def is_said(rows: TokenTrees):
        return (rows.tokens == config.reset_id) & (rows.loss_weights > 0)

    def totals_of(rows: TokenTrees):
        """Returns what the terms of the whole batch are divided by."""
        chosen_weight = jnp.sum(jnp.maximum(rows.loss_weights, 0))
        return (
            chosen_weight,
            jnp.sum(pair_slots(rows.pair_id, rows.loss_weights)),
            jnp.maximum(jnp.sum(is_said(rows)), 1),
        )

    def loss_of(params: nnx.State, frozen: nnx.State, batch: Batch, totals):
        """Loss and metrics of some rows, as their share of the batch's."""
        rows, (chosen_weight, pairs, num_resets) = batch.rows, totals
        logprob_BxS = token_logprobs(nnx.merge(graph, params, frozen), rows, config.logits_chunk_size)
        if config.objective == "sft":
            loss, metrics = sft_loss(logprob_BxS, rows.loss_weights, chosen_weight), {}
        else:
            logps_BxSx2 = pair_logps(logprob_BxS, rows.pair_id, rows.loss_weights)
            is_pair_BxS = pair_slots(rows.pair_id, rows.loss_weights)
            loss, metrics = dpo_loss(logps_BxSx2, batch.reference, is_pair_BxS, config.beta, pairs)
            metrics["dpo_loss"] = loss
            if config.rpo_alpha:
                loss += config.rpo_alpha * sft_loss(logprob_BxS, jnp.maximum(rows.loss_weights, 0), chosen_weight)
        if config.reset_id is not None:
            metrics["reset_loss"] = -jnp.sum(jnp.where(is_said(rows), logprob_BxS, 0)) / num_resets
        return loss, metrics | {"loss": loss}

    def gradients_of(params: nnx.State, frozen: nnx.State, batch: Batch):
        totals = totals_of(batch.rows)

        def gradient_of(*arguments):
            gradients, metrics = jax.grad(loss_of, has_aux=True)(*arguments)
            return jax.lax.with_sharding_constraint(gradients, shardings), metrics

        if config.grad_accumulation_steps == 1:
            return gradient_of(params, frozen, batch, totals)

        def add(sums, part: Batch):
            return jax.tree.map(jnp.add, sums, gradient_of(params, frozen, part, totals)), None

        # Every n-th row makes a part, not every n-th of the batch: so each device finds its rows of it among its own.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, config.grad_accumulation_steps, *x.shape[1:]), 1, 0), batch
        )
        first = jax.tree.map(lambda x: x[0], parts)
        none = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient_of, params, frozen, first, totals))
        return jax.lax.scan(add, none, parts)[0]

    return gradients_of


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def logps(graph: nnx.GraphDef, params: nnx.State, rows: TokenTrees, chunk: int) -> jax.Array:
    """Returns both sides of every pair of a batch under these parameters, `[B, S, 2]` float32 in each pair's slot."""
    logprob_BxS = token_logprobs(nnx.merge(graph, params), rows, chunk)
    return pair_logps(logprob_BxS, rows.pair_id, rows.loss_weights)
