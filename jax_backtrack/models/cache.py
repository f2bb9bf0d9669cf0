"""The key-value cache. Slots carry no order; `live` and `position` say what a slot is.

Two rows, prompts of 3 and 2 tokens, after three steps of the loop (`.` is a slot that no query sees):

    slot        0   1   2 | 3   4   5   6        position of each live slot
    row 0       x0  x1  x2| y0  y1  y2           0 1 2 | 3 4 5
    row 1       x0  x1  . | y0  y1  y2           0 1 . | 2 3 4

Row 1 says [RESET] (`rewind`): its slots behind the prompt die where they stand, and the next token, [RESET] itself,
is written at the common cursor with the position right behind the prompt. Row 0 notices nothing:

    row 0       x0  x1  x2| y0  y1  y2  y3       0 1 2 | 3 4 5 6
    row 1       x0  x1  . | .   .   .   [R]      0 1 . | . . . 2
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_backtrack.sharding import place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """keys, values: `[L, B, S, K, D]`; position: int32 `[B, S]`; live: bool `[B, S]`; cursor: int32 scalar.

    `cursor` is the slot that every row writes next: one dynamic-update-slice, whatever the rows have done before.
    """

    keys: jax.Array
    values: jax.Array
    position: jax.Array
    live: jax.Array
    cursor: jax.Array

    @classmethod
    def empty(cls, config, rows: int, slots: int, dtype, mesh: Mesh | None = None) -> "Cache":
        """A cache without live slots for `rows` sequences of up to `slots` tokens, spread over rows and heads."""
        shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
        return cls(
            keys=place(jnp.zeros(shape, dtype), "LxBxSxKxD", mesh),
            values=place(jnp.zeros(shape, dtype), "LxBxSxKxD", mesh),
            position=place(jnp.zeros((rows, slots), jnp.int32), "BxS", mesh),
            live=place(jnp.zeros((rows, slots), bool), "BxS", mesh),
            cursor=jnp.zeros((), jnp.int32),
        )

    def claim(self, position_BxT: jax.Array, live_BxT: jax.Array) -> "Cache":
        """Marks the `T` slots at the cursor as holding these positions, before `write` fills them layer by layer."""
        at = (0, self.cursor)
        return dataclasses.replace(
            self,
            position=jax.lax.dynamic_update_slice(self.position, position_BxT, at),
            live=jax.lax.dynamic_update_slice(self.live, live_BxT, at),
        )

    def visible(self, position_BxT: jax.Array, window: int | None = None) -> jax.Array:
        """bool `[B, T, S]`: the slots that a token at each position sees: live, not behind it, inside the window.

        All live slots of a row lie on one path of its token tree, so the order of positions is ancestry.
        """
        distance_BxTxS = position_BxT[:, :, None] - self.position[:, None, :]
        visible_BxTxS = self.live[:, None, :] & (distance_BxTxS >= 0)
        return visible_BxTxS if window is None else visible_BxTxS & (distance_BxTxS < window)

    def write(self, layer: jax.Array, key_BxTxKxD: jax.Array, value_BxTxKxD: jax.Array) -> "Cache":
        """Writes one layer's keys and values of `T` tokens at the cursor."""
        at = (layer, 0, self.cursor, 0, 0)
        return dataclasses.replace(
            self,
            keys=jax.lax.dynamic_update_slice(self.keys, key_BxTxKxD[None].astype(self.keys.dtype), at),
            values=jax.lax.dynamic_update_slice(self.values, value_BxTxKxD[None].astype(self.values.dtype), at),
        )

    def layer(self, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer, `[B, S, K, D]` each."""
        return self.keys[index], self.values[index]

    def advance(self, tokens: int) -> "Cache":
        """Moves the cursor behind what was written."""
        return dataclasses.replace(self, cursor=self.cursor + tokens)

    def forget_from(self, position_B: jax.Array, rows_B: jax.Array) -> "Cache":
        """Takes back a slice: in the rows of `rows_B` (bool), slots at `position_B` and behind it are live no more."""
        kept_BxS = self.position < position_B[:, None]
        return dataclasses.replace(self, live=self.live & (kept_BxS | ~rows_B[:, None]))
