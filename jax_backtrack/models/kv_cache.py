"""The key-value cache: the slots of a prompt, and behind them a ring that all rows write at one cursor.

A row sees two runs of slots, so two numbers say what it sees: the first `kept` slots of its prompt, and of the ring the
`written` newest ones. Slot `i` of a prompt holds position `i`; the newest token stands at `kept + written - 1`.

Two rows, prompts of 3 and 2 tokens, rings of 4 slots, after three steps of the loop (`.` is a slot that no query sees):

    slot        prompt      ring            kept  written
    row 0       x0  x1  x2| y0  y1  y2  .    3     3
    row 1       x0  x1  . | y0  y1  y2  .    2     3

Row 1 says [RESET] (`rewind`): nothing of what it wrote is seen any more, and the next token, [RESET] itself, stands
right behind the prompt. The cursor goes on, round the ring. Row 0 notices nothing:

    row 0       x0  x1  x2| y0  y1  y2  y3   3     4
    row 1       x0  x1  . | .   .   .   [R]  2     1

What a row overwrites is as old as the ring is long. So a row that has not filled the ring since it began, or began
again, never loses a token; a row whose ring is full must end.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from jax_backtrack.distributed.mesh import logical_to_spec, platform, shard

Layers = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a batch of rows has read and written.

    keys, values: `[L, B, K, S, D]`, or where layers are apart keys `[B * K, D, S]` and values `[B * K, S, D]` for each:
             a CPU multiplies keys by a query slot by slot, a TPU wants to write a slot in one piece; and as matrices
             in one row XLA's CPU backend multiplies them where they lie; otherwise it copies them, in a batch of one
    kept, written: int32 `[B]`, see above
    cursor:  int32 scalar, the slot of the ring that every row writes next
    ring:    slots of the ring, the last ones of `S`
    mesh:    over which rows and heads are spread
    """

    keys: Layers
    values: Layers
    kept: jax.Array
    written: jax.Array
    cursor: jax.Array
    ring: int = dataclasses.field(metadata=dict(static=True))
    mesh: Mesh | None = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def empty(
        cls, config, rows: int, prompt: int, ring: int, dtype, mesh: Mesh | None = None, stacked: bool = True
    ) -> "Cache":
        """A cache of which no row sees anything, spread over rows and heads; `stacked` is one array for all layers."""
        layers, slots = config.num_hidden_layers, prompt + ring
        head, dim = config.num_key_value_heads, config.head_dim

        def make(axes: str, *shape: int) -> Layers:
            if stacked:
                return shard(jnp.zeros((layers, rows, *shape), dtype), f"LxBx{axes}", mesh)
            return tuple(jnp.zeros((rows * shape[0], *shape[1:]), dtype) for _ in range(layers))

        nothing_B = shard(jnp.zeros(rows, jnp.int32), "B", mesh)
        return cls(
            keys=make("KxSxD", head, slots, dim) if stacked else make("KxDxS", head, dim, slots),
            values=make("KxSxD", head, slots, dim),
            kept=nothing_B,
            written=nothing_B,
            cursor=jnp.zeros((), jnp.int32),
            ring=ring,
            mesh=mesh,
        )

    @property
    def slots(self) -> int:
        """Slots of a row, of its prompt and of the ring."""
        return self.values[0].shape[-2]

    @property
    def position(self) -> jax.Array:
        """int32 `[B]`: where each row's next token stands."""
        return self.kept + self.written

    @property
    def is_full(self) -> jax.Array:
        """bool `[B]`: the row would lose its oldest token by writing one more."""
        return self.written >= self.ring

    def visible(self, tokens: int, window: int | None = None) -> jax.Array:
        """bool `[B, T, S]`: what the next `T` tokens of each row see, themselves included, inside the window.

        All slots that a row sees lie on one path of its token tree, so the order of positions is ancestry. More than
        one token may be fed only where the ring does not end among them.
        """
        later_T = jnp.arange(tokens)
        prompt = self.slots - self.ring
        ago_TxR = (self.cursor + later_T[:, None] - jnp.arange(self.ring)) % self.ring
        visible_BxTxR = ago_TxR <= self.written[:, None, None] + later_T[:, None]
        visible_BxP = jnp.arange(prompt) < self.kept[:, None]
        visible_BxTxP = jnp.broadcast_to(visible_BxP[:, None], (len(self.kept), tokens, prompt))
        if window is not None:
            ago_BxTxP = self.position[:, None, None] + later_T[:, None] - jnp.arange(prompt)
            visible_BxTxP &= ago_BxTxP < window
            visible_BxTxR &= ago_TxR < window
        return jnp.concatenate([visible_BxTxP, visible_BxTxR], axis=-1)

    def write(self, layer: int | jax.Array, key_BxTxKxD: jax.Array, value_BxTxKxD: jax.Array) -> "Cache":
        """Writes one layer's keys and values of `T` tokens at the cursor; `layer` is an int where layers are apart."""
        slot = self.slots - self.ring + self.cursor
        key_BxKxTxD, value_BxKxTxD = (new.transpose(0, 2, 1, 3) for new in (key_BxTxKxD, value_BxTxKxD))
        write = functools.partial(_write, platform(self.mesh) == "tpu")
        return self._in_parts(write, (key_BxKxTxD, value_BxKxTxD, layer, slot))

    def layer(self, index: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, `[B, K, S, D]` or, where layers are apart, as said above."""
        return self.keys[index], self.values[index]

    def advance(self, tokens: int) -> "Cache":
        """Moves behind what was written, round the ring."""
        cursor = (self.cursor + tokens) % self.ring
        return dataclasses.replace(self, written=self.written + tokens, cursor=cursor)

    def back_to(self, position_B: jax.Array, rows_B: jax.Array) -> "Cache":
        """Takes back a slice: the rows of `rows_B` (bool) see nothing but the first `position` tokens of the prompt."""
        kept = jnp.where(rows_B, position_B, self.kept)
        return dataclasses.replace(self, kept=kept, written=jnp.where(rows_B, 0, self.written))

    def as_prompts(self, ring: int) -> "Cache":
        """With all that was read into the ring, which is full, as the rows' prompts, and an empty ring behind them."""
        slots_last = isinstance(self.keys, tuple)

        def with_room(array: jax.Array, slots: int) -> jax.Array:
            sizes = [(0, 0)] * array.ndim
            sizes[slots] = (0, ring)
            return jnp.pad(array, sizes)

        return dataclasses.replace(
            self,
            keys=jax.tree.map(lambda one: with_room(one, -1 if slots_last else -2), self.keys),
            values=jax.tree.map(lambda one: with_room(one, -2), self.values),
            kept=self.written,
            written=jnp.zeros_like(self.written),
            cursor=jnp.zeros_like(self.cursor),
            ring=ring,
        )

    def put_prompts(self, row_N: jax.Array, read: "Cache") -> "Cache":
        """Puts prompts that were read into another cache of the same kind in place of rows' prompts.

        The rows lie in `N` parts, on a mesh one for each part of it. Prompt `n` goes to row `row_N[n]` of part `n`,
        and nowhere where that is -1: no prompt has to travel.
        """
        return self._in_parts(functools.partial(_put, self._rows_apart), (row_N, read.keys, read.values))

    def copy_prompts(self, source_N: jax.Array, target_N: jax.Array) -> "Cache":
        """In each of `N` parts of the rows copies a prompt from row to row, and none where the target is -1."""
        prompt = self.slots - self.ring
        return self._in_parts(functools.partial(_copy, self._rows_apart, prompt), (source_N, target_N))

    @property
    def _rows_apart(self) -> int:
        """Rows of an array that one row of the batch has where layers are apart, one for each head."""
        return len(self.keys[0]) // len(self.kept)

    def _in_parts(self, function, operands) -> "Cache":
        """Each device does `function(keys, values, *operands)` with its own rows and heads."""
        if self.mesh is not None and self.mesh.size > 1:
            axes = {5: "LxBxKxSxD", 4: "BxKxTxD", 1: "B"}
            places = [
                logical_to_spec(axes[ndim], "computed") if ndim else PartitionSpec() for ndim in map(jnp.ndim, operands)
            ]
            stack = logical_to_spec(axes[5], "computed")
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=(stack, stack, *places), out_specs=(stack, stack), check_vma=False
            )
        keys, values = function(self.keys, self.values, *operands)
        return dataclasses.replace(self, keys=keys, values=values)


def _write(on_tpu: bool, keys: Layers, values: Layers, key_BxKxTxD, value_BxKxTxD, layer, slot):
    if not isinstance(keys, tuple):
        at = (layer, 0, 0, slot, 0)
        grown = _update(keys, key_BxKxTxD[None], at), _update(values, value_BxKxTxD[None], at)
        return tuple(map(_as_it_lies, grown)) if on_tpu else grown
    key_RxTxD, value_RxTxD = (new.reshape(-1, *new.shape[2:]) for new in (key_BxKxTxD, value_BxKxTxD))
    key = _update(keys[layer], key_RxTxD.swapaxes(1, 2), (0, 0, slot))
    value = _update(values[layer], value_RxTxD, (0, slot, 0))
    return (*keys[:layer], key, *keys[layer + 1 :]), (*values[:layer], value, *values[layer + 1 :])


def _put(rows_apart: int, keys: Layers, values: Layers, row_1, read_keys: Layers, read_values: Layers):
    def put(array, read):
        return _replace_row(array, read, row_1[0], rows_apart)

    return jax.tree.map(put, keys, read_keys), jax.tree.map(put, values, read_values)


def _copy(rows_apart: int, prompt: int, keys: Layers, values: Layers, source_1, target_1):
    apart = isinstance(keys, tuple)

    def copy(array, slots: int):
        if apart:
            taken = jax.lax.dynamic_slice_in_dim(array, rows_apart * source_1[0], rows_apart, 0)
        else:
            taken = jax.lax.dynamic_slice_in_dim(array, source_1[0], 1, 1)
        taken = jax.lax.slice_in_dim(taken, 0, prompt, axis=array.ndim + slots)
        return _replace_row(array, taken, target_1[0], rows_apart)

    return (
        jax.tree.map(lambda one: copy(one, -1 if apart else -2), keys),
        jax.tree.map(lambda one: copy(one, -2), values),
    )


def _replace_row(array, new, row, rows_apart: int) -> jax.Array:
    """Writes the beginning of a row of the batch; nothing where the row is -1."""
    wanted, row = row >= 0, jnp.maximum(row, 0)
    at = (0, row, 0, 0, 0) if array.ndim == 5 else (rows_apart * row, 0, 0)
    old = jax.lax.dynamic_slice(array, at, new.shape)
    return _update(array, jnp.where(wanted, new.astype(array.dtype), old), at)


def _update(array, new, at: tuple) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, new.astype(array.dtype), at)


def _as_it_lies(array: jax.Array) -> jax.Array:
    """Holds the order of axes in memory: the TPU compiler would turn keys round to write, and back to read them."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))
