"""One training step: scores of a batch of trees, a loss, an update. Compiled once per run."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_backtrack.losses import dpo_loss, pair_margins, sft_loss
from jax_backtrack.models.scores import token_scores
from jax_backtrack.trees import Rows


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the compiled step depends on. The fields are those of the recipe (`configs/base.py`)."""

    objective: str
    beta: float
    chosen_weight: float
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    score_chunk: int
    reset_id: int | None

    def schedule(self) -> optax.Schedule:
        """Linear warm-up to `learning_rate` at update `warmup_steps + 1`, then cosine decay to a tenth at the last."""
        return optax.warmup_cosine_decay_schedule(
            init_value=self.learning_rate / (self.warmup_steps + 1),
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(self.steps - 1, self.warmup_steps + 1),
            end_value=self.learning_rate / 10,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW behind clipping by the global norm; norms' scales are not decayed."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(self.schedule(), b2=0.95, weight_decay=self.weight_decay, mask=_is_matrix),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 scalar, updates done so far; params: the model's; optimizer: optax's state."""

    step: jax.Array
    params: nnx.State
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """rows: `[B, S]` token trees; reference_margin: float32 `[B, S]`, in each pair's slot, for DPO."""

    rows: Rows
    reference_margin: jax.Array


def init_state(params: nnx.State, plan: StepPlan) -> TrainState:
    """The state before the first step. Moments lie where their parameters do, scalars everywhere.

    `params` is donated: it lives on in the state only.
    """

    def make(params):
        return TrainState(jnp.zeros((), jnp.int32), params, plan.optimizer().init(params))

    places = jax.tree.map(lambda param: param.sharding, params)
    everywhere = jax.sharding.NamedSharding(jax.tree.leaves(places)[0].mesh, jax.sharding.PartitionSpec())
    optimizer_places = optax.tree_map_params(
        plan.optimizer(),
        lambda _, place: place,
        jax.eval_shape(make, params).optimizer,
        places,
        transform_non_params=lambda _: everywhere,
    )
    made = TrainState(everywhere, places, optimizer_places)
    return jax.jit(make, out_shardings=made, donate_argnums=0)(params)


def compile_step(
    graph: nnx.GraphDef, plan: StepPlan, state: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step `(state, batch) -> (state, metrics)`; it donates the state and leaves it where `state` lies.

    Metrics are scalars: `loss`, `grad_norm` (before clipping), `learning_rate`, `scored_tokens`, `reset_loss` (mean
    `-log p` of the [RESET] tokens that are to be said, where there are any); for DPO `dpo_loss`,
    without the part of `chosen_weight`, and the metrics of that function.
    """
    optimizer = plan.optimizer()

    def loss_of(params: nnx.State, batch: Batch):
        rows = batch.rows
        score_BxS = token_scores(nnx.merge(graph, params), rows, plan.score_chunk)
        if plan.objective == "sft":
            loss, metrics = sft_loss(score_BxS, rows.weight), {}
        else:
            margin_BxS, is_pair_BxS = pair_margins(score_BxS, rows.pair, rows.weight)
            loss, metrics = dpo_loss(margin_BxS, batch.reference_margin, is_pair_BxS, plan.beta)
            metrics["dpo_loss"] = loss
            if plan.chosen_weight:
                loss += plan.chosen_weight * sft_loss(score_BxS, jnp.maximum(rows.weight, 0))
        if plan.reset_id is not None:
            said_BxS = (rows.tokens == plan.reset_id) & (rows.weight > 0)
            metrics["reset_loss"] = -jnp.sum(jnp.where(said_BxS, score_BxS, 0)) / jnp.maximum(jnp.sum(said_BxS), 1)
        return loss, metrics

    def step(state: TrainState, batch: Batch):
        (loss, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params, batch)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        metrics |= {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradients),
            "learning_rate": plan.schedule()(state.step),
            "scored_tokens": jnp.sum(batch.rows.weight != 0),
        }
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments), metrics

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def margins(graph: nnx.GraphDef, params: nnx.State, rows: Rows, chunk: int) -> jax.Array:
    """Margin of every pair of a batch under these parameters, `[B, S]` float32 in each pair's slot."""
    score_BxS = token_scores(nnx.merge(graph, params), rows, chunk)
    return pair_margins(score_BxS, rows.pair, rows.weight)[0]


def _is_matrix(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "scale_M" not in jax.tree_util.keystr(path), params)
