"""Linear maps by sharded parameters, with gradients written for wide outputs and for float32 parameters."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from jax_backtrack.distributed.mesh import shard


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x: jax.Array, w: jax.Array, axes: str, mesh: Mesh | None = None) -> jax.Array:
    """Returns `x @ w` in x's dtype: all axes of `x` `[B, T, ...]` behind the first two meet the first ones of `w`.

    `axes` names the axes of `w`, a parameter as it is kept. It is cast before it is gathered, so that half the bytes
    travel in bfloat16; its gradient has its own dtype, and is summed over the rows in it.

    JAX's own gradient of `w` transposes the cotangent; on CPU that drags the element-wise operations before it into
    a strided loop over `[F, B * T]`. Here the narrower input is transposed instead: a step takes a sixth less time.
    """
    inputs = tuple(range(x.ndim - 2))
    return jax.lax.dot_general(x, _at_work(w, x.dtype, axes, mesh), ((tuple(i + 2 for i in inputs), inputs), ((), ())))


def _at_work(w: jax.Array, dtype: jnp.dtype, axes: str, mesh: Mesh | None) -> jax.Array:
    return shard(w.astype(dtype), axes, mesh)


def _forward(x, w, axes, mesh):
    return linear(x, w, axes, mesh), (x, w)


def _backward(axes, mesh, residuals, dy):
    x, w = residuals
    inputs = x.ndim - 2
    outputs = tuple(range(2, dy.ndim))
    of_w = tuple(range(inputs, w.ndim))
    dx = jax.lax.dot_general(dy, _at_work(w, x.dtype, axes, mesh), ((outputs, of_w), ((), ())))
    dw = jax.lax.dot_general(x, dy, (((0, 1), (0, 1)), ((), ())), preferred_element_type=w.dtype)
    return dx, shard(dw, axes, mesh, "kept")


linear.defvjp(_forward, _backward)


def linear_in_place(x: jax.Array, w: jax.Array, axes: str, mesh: Mesh | None = None) -> jax.Array:
    """Multiplies as `linear` does, for few tokens, without a gradient of its own: `w` stays where it is kept, and what
    it makes of `x` is summed over the devices that have parts of it."""
    inputs = x.ndim - 2
    letters = axes.split("x")
    x = shard(x, "x".join(["B", "T", *letters[:inputs]]), mesh, "decoded")
    w = shard(w.astype(x.dtype), axes, mesh, "kept")
    y = jnp.tensordot(x, w, inputs)
    return shard(y, "x".join(["B", "T", *letters[inputs:]]), mesh, "decoded")


def linear_outputs_first(x: jax.Array, w: jax.Array, axes: str = "", mesh=None, dtype=None) -> jax.Array:
    """Multiplies as `linear` does, on one CPU, without its gradient, by a weight whose axes of outputs come first; in
    `dtype`, or x's own.

    With the weight on the left, the matrix library of XLA's CPU backend reads a weight that is much larger than `x` up
    to twice as fast; XLA's own product of a single vector is fastest with the vector there. The barriers keep XLA from
    turning products round.
    """
    inputs, hold = x.ndim - 2, jax.lax.optimization_barrier
    split = w.ndim - inputs
    w_OxI = w.reshape(math.prod(w.shape[:split]), -1).astype(x.dtype)
    x_RxI = x.reshape(-1, w_OxI.shape[1])
    if len(x_RxI) == 1:
        w_OxI = with_layout_constraint(w_OxI, Layout((0, 1)))
        y_RxO = hold(jnp.einsum("ri,oi->ro", hold(x_RxI), w_OxI, preferred_element_type=dtype))
    else:
        y_RxO = hold(jnp.matmul(w_OxI, hold(x_RxI.T), preferred_element_type=dtype)).T
    return y_RxO.reshape(*x.shape[:2], *w.shape[:split])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(hidden_BxTxM: jax.Array, table_VxM: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Logits `[B, T, V]` float32, each device's for its own part of the vocabulary, of hidden states in their dtype.

    The table's gradient has the table's own dtype; that of a hidden state is summed where its row lies.
    """
    hidden_BxTxM = shard(hidden_BxTxM, "BxTxM", mesh, "projected")
    table_VxM = table_VxM.astype(hidden_BxTxM.dtype)
    logits_BxTxV = jnp.einsum("btm,vm->btv", hidden_BxTxM, table_VxM, preferred_element_type=jnp.float32)
    return shard(logits_BxTxV, "BxTxV", mesh, "projected")


def _project_forward(hidden_BxTxM, table_VxM, mesh):
    return project(hidden_BxTxM, table_VxM, mesh), (hidden_BxTxM, table_VxM)


def _project_backward(mesh, residuals, dlogits_BxTxV):
    hidden_BxTxM, table_VxM = residuals
    dlogits_BxTxV = shard(dlogits_BxTxV.astype(hidden_BxTxM.dtype), "BxTxV", mesh, "projected")
    dhidden_BxTxM = jnp.einsum("btv,vm->btm", dlogits_BxTxV, table_VxM.astype(hidden_BxTxM.dtype))
    hidden_BxTxM = shard(hidden_BxTxM, "BxTxM", mesh, "projected")
    dtable_VxM = jnp.einsum("btv,btm->vm", dlogits_BxTxV, hidden_BxTxM, preferred_element_type=table_VxM.dtype)
    return shard(dhidden_BxTxM, "BxTxM", mesh), shard(dtable_VxM, "VxM", mesh, "projected")


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table_VxM: jax.Array, tokens_BxT: jax.Array, dtype: str, mesh: Mesh | None = None) -> jax.Array:
    """Rows of the table, `[B, T, M]` in `dtype`.

    Every device looks all rows of its group up in its part of the table; then each row's features come together. The
    gradient goes the same way back, and is summed in the table's dtype.
    """
    tokens_BxT = shard(tokens_BxT, "BxT", mesh, "looked up")
    table_VxM = shard(table_VxM.astype(dtype), "VxM", mesh, "looked up")
    return shard(shard(table_VxM[tokens_BxT], "BxTxM", mesh, "looked up"), "BxTxM", mesh)


def _look_up_forward(table_VxM, tokens_BxT, dtype, mesh):
    return look_up(table_VxM, tokens_BxT, dtype, mesh), (table_VxM, tokens_BxT)


def _look_up_backward(dtype, mesh, residuals, dx_BxTxM):
    table_VxM, tokens_BxT = residuals
    tokens_BxT = shard(tokens_BxT, "BxT", mesh, "looked up")
    dx_BxTxM = shard(dx_BxTxM, "BxTxM", mesh, "looked up").astype(table_VxM.dtype)
    none_VxM = shard(jnp.zeros(table_VxM.shape, table_VxM.dtype), "VxM", mesh, "looked up")
    dtable_VxM = shard(none_VxM.at[tokens_BxT].add(dx_BxTxM), "VxM", mesh, "looked up")
    return shard(dtable_VxM, "VxM", mesh, "projected"), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def look_up_in_place(table_VxM: jax.Array, tokens_BxT: jax.Array, dtype: str, mesh: Mesh | None = None) -> jax.Array:
    """Looks up few tokens: every device looks them up in its own rows of the table."""
    x_BxTxM = shard(table_VxM, "VxM", mesh, "projected")[tokens_BxT].astype(dtype)
    return shard(x_BxTxM, "BxTxM", mesh, "decoded")
