"""The key-value cache: the slots of a prompt, and behind them a ring that all rows write at one cursor.

A row sees two runs of slots, so two numbers say what it sees: the first `prompt_len` slots of its prompt, and of the
ring the `num_generated` newest ones. Slot `i` of a prompt holds position `i`; the newest token stands at position
`prompt_len + num_generated - 1`.

Two rows, prompts of 3 and 2 tokens, rings of 4 slots, after three steps of the loop (`.` is a slot that no query sees):

    slot        prompt      ring            prompt_len  num_generated
    row 0       x0  x1  x2| y0  y1  y2  .   3           3
    row 1       x0  x1  . | y0  y1  y2  .   2           3

Row 1 says [RESET] (`rewind`): nothing of what it wrote is seen any more, and the next token, [RESET] itself, stands
right after the prompt. The cursor goes on, round the ring. Row 0 notices nothing:

    row 0       x0  x1  x2| y0  y1  y2  y3  3           4
    row 1       x0  x1  . | .   .   .   [R] 2           1

What a row overwrites is as old as the ring is long. So a row that has not filled the ring since it began, or began
again, never loses a token; a row whose ring is full must end.
"""

import dataclasses
import functools
import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from jax_backtrack.distributed.mesh import logical_to_spec, platform, shard
from jax_backtrack.models.attention.dense import attend_to_cache

Arrays = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Holds what a batch of rows has read and written.

    keys, values: `[L, B, K, S, D]`: a TPU wants to write a slot in one piece
    prompt_len, num_generated: int32 `[B]`, see above
    cursor:    int32 scalar, the slot of the ring that every row writes next
    ring_size: slots of the ring, the last ones of `S`
    mesh:      over which rows and heads are spread

    A subclass may lay out keys and values otherwise, in arrays for each layer: it says which axes are those of rows and
    of a key's slots, and has its own `empty`, `write` and `attend`.
    """

    row_axis: typing.ClassVar[int] = 1
    key_slot_axis: typing.ClassVar[int] = -2
    value_slot_axis: typing.ClassVar[int] = -2

    keys: Arrays
    values: Arrays
    prompt_len: jax.Array
    num_generated: jax.Array
    cursor: jax.Array
    ring_size: int = dataclasses.field(metadata=dict(static=True))
    mesh: Mesh | None = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def empty(cls, config, rows: int, prompt: int, ring: int, dtype, mesh: Mesh | None = None) -> "Cache":
        """Returns a cache of which no row sees anything, spread over rows and heads."""
        head, dim = config.num_key_value_heads, config.head_dim
        zeros = jnp.zeros((config.num_hidden_layers, rows, head, prompt + ring, dim), dtype)
        return cls._of(shard(zeros, "LxBxKxSxD", mesh), shard(zeros, "LxBxKxSxD", mesh), rows, ring, mesh)

    @classmethod
    def _of(cls, keys: Arrays, values: Arrays, rows: int, ring: int, mesh: Mesh | None) -> "Cache":
        nothing_B = shard(jnp.zeros(rows, jnp.int32), "B", mesh)
        return cls(keys, values, nothing_B, nothing_B, jnp.zeros((), jnp.int32), ring, mesh)

    @property
    def slots(self) -> int:
        """Returns the number of slots of a row, of its prompt and of the ring."""
        return self.values[0].shape[-2]

    @property
    def position(self) -> jax.Array:
        """Returns int32 `[B]`: where each row's next token stands."""
        return self.prompt_len + self.num_generated

    @property
    def is_full(self) -> jax.Array:
        """Returns bool `[B]`: the row would lose its oldest token by writing one more."""
        return self.num_generated >= self.ring_size

    def visible(self, tokens: int, window: int | None = None) -> jax.Array:
        """Returns bool `[B, T, S]`: what the next `T` tokens of each row see, themselves included, inside the window.

        All slots that a row sees lie on one path of its token tree, so the order of positions is ancestry. More than
        one token may be fed only where the ring does not end among them.
        """
        later_T = jnp.arange(tokens)
        prompt = self.slots - self.ring_size
        ago_TxR = (self.cursor + later_T[:, None] - jnp.arange(self.ring_size)) % self.ring_size
        visible_BxTxR = ago_TxR <= self.num_generated[:, None, None] + later_T[:, None]
        visible_BxP = jnp.arange(prompt) < self.prompt_len[:, None]
        visible_BxTxP = jnp.broadcast_to(visible_BxP[:, None], (len(self.prompt_len), tokens, prompt))
        if window is not None:
            ago_BxTxP = self.position[:, None, None] + later_T[:, None] - jnp.arange(prompt)
            visible_BxTxP &= ago_BxTxP < window
            visible_BxTxR &= ago_TxR < window
        return jnp.concatenate([visible_BxTxP, visible_BxTxR], axis=-1)

    def write(self, layer: int | jax.Array, key_BxTxKxD: jax.Array, value_BxTxKxD: jax.Array) -> "Cache":
        """Writes one layer's keys and values of `T` tokens at the cursor."""
        key_BxKxTxD, value_BxKxTxD = (new.transpose(0, 2, 1, 3) for new in (key_BxTxKxD, value_BxTxKxD))
        write = functools.partial(_write, platform(self.mesh) == "tpu")
        return self._in_parts(write, (key_BxKxTxD, value_BxKxTxD, layer, self._slot))

    def attend(self, layer: int | jax.Array, query_BxTxNxD: jax.Array, visible_BxTxS: jax.Array, **scores) -> jax.Array:
        """Attends to one layer's keys and values, `[B, T, N, D]`; `scores` are as of `attend_to_cache`."""
        return attend_to_cache(query_BxTxNxD, *self.layer(layer), visible_BxTxS, **scores)

    def layer(self, index: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of one layer."""
        return self.keys[index], self.values[index]

    def advance(self, tokens: int) -> "Cache":
        """Moves past what was written, round the ring."""
        cursor = (self.cursor + tokens) % self.ring_size
        return dataclasses.replace(self, num_generated=self.num_generated + tokens, cursor=cursor)

    def rewind_to(self, position_B: jax.Array, rows_B: jax.Array) -> "Cache":
        """Takes back a slice: the rows of `rows_B` (bool) see only the first `position` tokens of their prompts."""
        prompt_len = jnp.where(rows_B, position_B, self.prompt_len)
        return dataclasses.replace(self, prompt_len=prompt_len, num_generated=jnp.where(rows_B, 0, self.num_generated))

    def as_prompts(self, ring: int) -> "Cache":
        """Returns it with all that was read into the ring, which is full, as the rows' prompts, and an empty ring."""

        def with_room(array: jax.Array, slot_axis: int) -> jax.Array:
            sizes = [(0, 0)] * array.ndim
            sizes[slot_axis] = (0, ring)
            return jnp.pad(array, sizes)

        return dataclasses.replace(
            self,
            keys=jax.tree.map(lambda array: with_room(array, self.key_slot_axis), self.keys),
            values=jax.tree.map(lambda array: with_room(array, self.value_slot_axis), self.values),
            prompt_len=self.num_generated,
            num_generated=jnp.zeros_like(self.num_generated),
            cursor=jnp.zeros_like(self.cursor),
            ring_size=ring,
        )

    def insert_prompts(self, row_Z: jax.Array, prefilled: "Cache") -> "Cache":
        """Inserts prompts that were read into another cache of the same kind in place of rows' prompts.

        The rows lie in `Z` parts, on a mesh one for each part of it. Prompt `z` goes to row `row_Z[z]` of part `z`,
        and nowhere where that is -1: no prompt has to travel.
        """

        def insert(keys, values, row_1, prefilled_keys, prefilled_values):
            return jax.tree.map(
                lambda array, new: self._replace_row(array, new, row_1[0]),
                (keys, values),
                (prefilled_keys, prefilled_values),
            )

        return self._in_parts(insert, (row_Z, prefilled.keys, prefilled.values))

    def copy_prompts(self, source_Z: jax.Array, target_Z: jax.Array) -> "Cache":
        """Copies a prompt from row to row in each of `Z` parts of the rows, and none where the target is -1."""
        prompt, width = self.slots - self.ring_size, self._row_width

        def copied(array, slot_axis: int, source_1, target_1):
            row = jax.lax.dynamic_slice_in_dim(array, width * source_1[0], width, self.row_axis)
            row = jax.lax.slice_in_dim(row, 0, prompt, axis=array.ndim + slot_axis)
            return self._replace_row(array, row, target_1[0])

        def copy(keys, values, *rows):
            return (
                jax.tree.map(lambda array: copied(array, self.key_slot_axis, *rows), keys),
                jax.tree.map(lambda array: copied(array, self.value_slot_axis, *rows), values),
            )

        return self._in_parts(copy, (source_Z, target_Z))

    @property
    def _slot(self) -> jax.Array:
        return self.slots - self.ring_size + self.cursor

    @property
    def _row_width(self) -> int:
        """Entries that one row of the batch has along the axis of rows."""
        return jax.tree.leaves(self.keys)[0].shape[self.row_axis] // len(self.prompt_len)

    def _replace_row(self, array, new, row) -> jax.Array:
        """Writes the beginning of a row of the batch; nothing where the row is -1."""
        is_replaced, at = row >= 0, [0] * array.ndim
        at[self.row_axis] = self._row_width * jnp.maximum(row, 0)
        old = jax.lax.dynamic_slice(array, at, new.shape)
        return update(array, jnp.where(is_replaced, new.astype(array.dtype), old), at)

    def _in_parts(self, function, operands) -> "Cache":
        """Lets each device do `function(keys, values, *operands)` with its own rows and heads."""
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


def _write(on_tpu: bool, keys, values, key_BxKxTxD, value_BxKxTxD, layer, slot):
    at = (layer, 0, 0, slot, 0)
    grown = update(keys, key_BxKxTxD[None], at), update(values, value_BxKxTxD[None], at)
    return tuple(map(_as_it_lies, grown)) if on_tpu else grown


def update(array: jax.Array, new: jax.Array, at: Sequence) -> jax.Array:
    """Writes `new` at a place of an array, in the array's dtype."""
    return jax.lax.dynamic_update_slice(array, new.astype(array.dtype), tuple(at))


def _as_it_lies(array: jax.Array) -> jax.Array:
    """Holds the order of axes in memory: the TPU compiler would turn keys round to write, and back to read them."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))
