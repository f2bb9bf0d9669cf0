"""AdamW whose moments may be kept in fewer bits than the parameters, and a rate of its own for the row of [RESET]."""

import jax
import jax.numpy as jnp
import optax

_TABLES = ("embedding_VxM", "head_VxM")
_ROW_ADAPTERS = "row_adapters"  # what adapters train in place of the tables


def adamw(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float, first_dtype: str, second_dtype: str
) -> optax.GradientTransformation:
    """Returns AdamW with `b1 = 0.9`, `b2 = 0.95` (Loshchilov & Hutter 2019, arXiv 1711.05101); norms' scales are not
    decayed.

    The moments are kept in `first_dtype` and `second_dtype`, and updates computed in float32. Each is a weighted mean
    in which a step counts a tenth, or a twentieth: bfloat16, which resolves 1/256, loses no step to rounding.
    """
    return optax.chain(
        _second_moment_in(optax.scale_by_adam(b2=0.95, mu_dtype=first_dtype), second_dtype),
        optax.add_decayed_weights(weight_decay, _is_matrix),
        optax.scale_by_learning_rate(learning_rate),
    )


def reset_rows_faster(reset_id: int, rate: float) -> optax.GradientTransformation:
    """Multiplies the updates of [RESET]'s rows, in the embedding and in the head, by `rate`.

    The row starts among those of other words and has to leave them, which at a rate that spares the rest of the model
    it does not do in a short training.
    """

    def faster(path, update):
        name = jax.tree_util.keystr(path)
        if _ROW_ADAPTERS in name:
            return update * rate
        if not any(table in name for table in _TABLES):
            return update
        is_reset_V = jnp.arange(update.shape[0]) == reset_id
        return update * jnp.where(is_reset_V, rate, 1.0).astype(update.dtype)[:, None]

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(faster, updates))


def _second_moment_in(adam: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    def cast(state, to):
        return state._replace(nu=jax.tree.map(lambda nu: nu.astype(to), state.nu))

    def init(params):
        return cast(adam.init(params), dtype)

    def update(gradients, state, params=None):
        updates, state = adam.update(gradients, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def _is_matrix(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "scale_M" not in jax.tree_util.keystr(path), params)
