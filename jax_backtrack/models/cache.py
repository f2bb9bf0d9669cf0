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
from jax.sharding import Mesh

from jax_backtrack.sharding import partition, place

Layers = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What a batch of rows has read and written.

    keys:    `[L, B, K, D, S]`, or one array for each layer; slots come last, where queries meet them
    values:  `[L, B, K, S, D]`, likewise
    kept, written: int32 `[B]`, see above
    cursor:  int32 scalar, the slot of the ring that every row writes next
    ring:    slots of the ring, the last ones of `S`
    """

    keys: Layers
    values: Layers
    kept: jax.Array
    written: jax.Array
    cursor: jax.Array
    ring: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def empty(
        cls, config, rows: int, prompt: int, ring: int, dtype, mesh: Mesh | None = None, stacked: bool = True
    ) -> "Cache":
        """A cache of which no row sees anything, spread over rows and heads; `stacked` is one array for all layers."""
        layers, slots = config.num_hidden_layers, prompt + ring
        head, dim = config.num_key_value_heads, config.head_dim

        def make(axes: str, *shape: int) -> Layers:
            if stacked:
                return place(jnp.zeros((layers, rows, *shape), dtype), f"LxBx{axes}", mesh)
            return tuple(place(jnp.zeros((rows, *shape), dtype), f"Bx{axes}", mesh) for _ in range(layers))

        nothing_B = place(jnp.zeros(rows, jnp.int32), "B", mesh)
        return cls(
            keys=make("KxDxS", head, dim, slots),
            values=make("KxSxD", head, slots, dim),
            kept=nothing_B,
            written=nothing_B,
            cursor=jnp.zeros((), jnp.int32),
            ring=ring,
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
        key_BxKxDxT, value_BxKxTxD = key_BxTxKxD.transpose(0, 2, 3, 1), value_BxTxKxD.transpose(0, 2, 1, 3)
        slot = self.slots - self.ring + self.cursor
        return dataclasses.replace(
            self,
            keys=_write(self.keys, layer, key_BxKxDxT, (0, 0, 0, slot)),
            values=_write(self.values, layer, value_BxKxTxD, (0, 0, slot, 0)),
        )

    def layer(self, index: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys `[B, K, D, S]` and values `[B, K, S, D]` of one layer."""
        return self.keys[index], self.values[index]

    def advance(self, tokens: int) -> "Cache":
        """Moves behind what was written, round the ring."""
        cursor = (self.cursor + tokens) % self.ring
        return dataclasses.replace(self, written=self.written + tokens, cursor=cursor)

    def back_to(self, position_B: jax.Array, rows_B: jax.Array) -> "Cache":
        """Takes back a slice: the rows of `rows_B` (bool) see nothing but the first `position` tokens of the prompt."""
        kept = jnp.where(rows_B, position_B, self.kept)
        return dataclasses.replace(self, kept=kept, written=jnp.where(rows_B, 0, self.written))

    def put_prompts(self, row_N: jax.Array, read: "Cache", mesh: Mesh | None = None) -> "Cache":
        """Puts prompts that were read into the ring of another, stacked cache in place of rows' prompts.

        The rows lie in `N` parts, on a mesh one for each part of it. Prompt `n` goes to row `row_N[n]` of part `n`,
        and nowhere where that is -1: no prompt has to travel.
        """
        return self._in_parts(_put, (row_N, read.keys, read.values), mesh)

    def copy_prompts(self, source_N: jax.Array, target_N: jax.Array, mesh: Mesh | None = None) -> "Cache":
        """In each of `N` parts of the rows copies a prompt from row to row, and none where the target is -1."""
        return self._in_parts(functools.partial(_copy, self.slots - self.ring), (source_N, target_N), mesh)

    def _in_parts(self, function, operands, mesh: Mesh | None) -> "Cache":
        """Each part of the rows gets `function(keys, values, *operands)` of its own."""
        if mesh is not None and mesh.size > 1:
            prefix = "LxB" if isinstance(self.keys, jax.Array) else "B"
            keys, values, row = (partition(axes, "computed") for axes in (f"{prefix}xKxDxS", f"{prefix}xKxSxD", "B"))
            read = partition("LxBxKxDxS", "computed"), partition("LxBxKxSxD", "computed")
            specs = keys, values, *((row, row) if len(operands) == 2 else (row, *read))
            function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=(keys, values), check_vma=False)
        keys, values = function(self.keys, self.values, *operands)
        return dataclasses.replace(self, keys=keys, values=values)


def _put(keys: Layers, values: Layers, row_1, read_keys_Lx1x, read_values_Lx1x):
    def put(layers, read_Lx1x):
        if isinstance(layers, tuple):
            return tuple(_replace_row(one, read_Lx1x[number], row_1[0], 0) for number, one in enumerate(layers))
        return _replace_row(layers, read_Lx1x, row_1[0], 1)

    return put(keys, read_keys_Lx1x), put(values, read_values_Lx1x)


def _copy(prompt: int, keys: Layers, values: Layers, source_1, target_1):
    def copy(array, slots: int):
        axis = array.ndim - 4
        taken = jax.lax.dynamic_slice_in_dim(array, source_1[0], 1, axis)
        taken = jax.lax.slice_in_dim(taken, 0, prompt, axis=array.ndim + slots)
        return _replace_row(array, taken, target_1[0], axis)

    return jax.tree.map(lambda one: copy(one, -1), keys), jax.tree.map(lambda one: copy(one, -2), values)


def _replace_row(array, new, row, axis: int) -> jax.Array:
    """Writes the beginning of a row; nothing where the row is -1."""
    at = [0] * array.ndim
    at[axis] = jnp.maximum(row, 0)
    old = jax.lax.dynamic_slice(array, at, new.shape)
    return _update(array, jnp.where(row >= 0, new.astype(array.dtype), old), tuple(at))


def _write(layers: Layers, layer, new, at: tuple) -> Layers:
    if isinstance(layers, tuple):
        return (*layers[:layer], _update(layers[layer], new, at), *layers[layer + 1 :])
    return _update(layers, new[None], (layer, *at))


def _update(array, new, at: tuple) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, new.astype(array.dtype), at)
