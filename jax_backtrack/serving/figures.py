"""Pictures drawn from the arrays themselves: token trees, the cache while rows reset, the probability of [RESET].

Each function gives a matplotlib figure, which a notebook shows and `savefig` writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jax_backtrack.backtracking import trees
from jax_backtrack.errors import InputError
from jax_backtrack.sampling.cache_trace import NOTHING, CacheStep
from jax_backtrack.sampling.replies import Trace
from jax_backtrack.tokenizer.chat_tokenizer import RESET, ChatTokenizer

if TYPE_CHECKING:  # matplotlib takes a fifth of a second, which only those who draw should wait
    from matplotlib.figure import Figure

_LONGEST = 11  # characters of a token
_PLUS, _MINUS, _CONTEXT, _RESET = "#3ca951", "#e4574c", "#b8bdc7", "#efa020"
_SEEN, _OWN, _UNSEEN, _EMPTY = "#a9c7f5", "#4269d0", "#ededed", "#ffffff"


def tree(row: trees.TokenTrees, tokenizer: ChatTokenizer, start: int = 0) -> Figure:
    """Returns a row of token trees, `[S]`, as the branches that it stands for: depth from left to right, a line per
    branch.

    Green tokens are to become likelier, red ones less likely, grey ones are context only; a dashed frame is of a second
    pair. Tokens before `start` are left out, which should be a part of the prompt.
    """
    indices = _kept(row, start)
    parent, position = np.asarray(row.parent), np.asarray(row.position)
    line, lines = {}, 0
    for index in indices:
        lines += index != indices[0] and parent[index] != index - 1
        line[index] = lines
    first = position[indices].min()
    columns = int(position[indices].max() - first) + 1
    figure, axes = _empty(0.78 * columns + 0.3, 0.5 * (lines + 1) + 0.2)
    for index in indices:
        x, y, above = position[index] - first, line[index], int(parent[index])
        if above in line:
            axes.plot([x - 1, x - 0.5, x - 0.5, x], [line[above], line[above], y, y], color="#888", lw=0.8, zorder=0)
        weight, pair = row.loss_weights[index], row.pair_id[index]
        frame = dict(
            boxstyle="round,pad=0.25",
            facecolor=_PLUS if weight > 0 else _MINUS if weight < 0 else _CONTEXT,
            edgecolor="black",
            linewidth=0.8 if pair != trees.NO_PAIR and weight else 0,
            linestyle="--" if pair > 0 else "-",
        )
        _write(axes, x, y, _spelt(tokenizer, row.tokens[index]), size=7, bbox=frame)
    axes.set(xlim=(-0.6, columns - 0.4), ylim=(lines + 0.6, -0.6))
    axes.axis("off")
    return figure


def mask(row: trees.TokenTrees, tokenizer: ChatTokenizer, start: int = 0, window: int | None = None) -> Figure:
    """Returns who attends to whom in a row of token trees, `[S]`, by `trees.tree_attention_mask`: queries down, keys
    across.

    Tokens before `start` are left out, and padding at the end.
    """
    indices = _kept(row, start)
    sees_SxS = np.asarray(trees.tree_attention_mask(row.position[None], row.subtree_end[None], window))[0][
        np.ix_(indices, indices)
    ]
    side = 0.165 * len(indices) + 1
    figure, axes = _empty(side, side)
    axes.imshow(_colours(np.where(np.eye(len(indices), dtype=bool), 2, sees_SxS), [_EMPTY, _SEEN, _OWN]))
    labels = [_spelt(tokenizer, row.tokens[index]) for index in indices]
    ticks = range(len(indices))
    for text in (
        *axes.set_xticks(ticks, labels, rotation=90, fontsize=6),
        *axes.set_yticks(ticks, labels, fontsize=6),
    ):
        text.label1.set_parse_math(False)
    axes.tick_params(length=0)
    axes.set(xlabel="key", ylabel="query")
    _grid(axes, len(indices), len(indices))
    return figure


def cache(steps: Sequence[CacheStep], tokenizer: ChatTokenizer, row: int = 0, start: int = 0) -> Figure:
    """Draws what one row of a batch sees of its slots, step by step downwards, as long as it writes.

    Dark is the slot that is written, blue are those seen besides, grey those whose token is not seen. Slots before
    `start` are left out, and those that the row never writes, as after a prompt that is shorter than another.
    """
    steps = [step for step in steps if not step.done[row]]
    if not steps:
        raise InputError(f"row {row} has no steps that could be drawn")
    slots = np.flatnonzero(steps[-1].holds[row] != NOTHING)
    slots = slots[slots >= start]
    figure, axes = _empty(0.56 * len(slots) + 0.8, 0.24 * len(steps) + 0.5)
    kinds = []
    for step in steps:
        sees_S, holds_S = step.sees[row, slots], step.holds[row, slots]
        kinds.append(np.where(slots == step.slot, 3, np.where(sees_S, 2, holds_S != NOTHING)))
    axes.imshow(_colours(np.array(kinds), [_EMPTY, _UNSEEN, _SEEN, _OWN]), aspect="auto")
    for number, step in enumerate(steps):
        for column, slot in enumerate(slots):
            if (token := step.holds[row, slot]) != NOTHING:
                is_seen = step.sees[row, slot]
                colour = "white" if slot == step.slot else "black" if is_seen else "#aaa"
                _write(axes, column, number, _spelt(tokenizer, token, 9), size=6, color=colour)
        if step.fed[row] == tokenizer.reset_id:
            axes.axhline(number - 0.5, color=_RESET, lw=2, zorder=3)
    _grid(axes, len(slots), len(steps))
    axes.axvline(np.sum(slots < steps[0].prompt) - 0.5, color="black", lw=1.5)
    axes.set_xticks(range(len(slots)), slots, fontsize=6)
    axes.set_yticks(range(len(steps)), range(1, len(steps) + 1), fontsize=6)
    axes.tick_params(length=0)
    axes.set(xlabel="slot: the prompt's, then the ring's", ylabel="step")
    return figure


def reset_chances(trace: Trace, tokenizer: ChatTokenizer) -> Figure:
    """Returns how likely [RESET] was in the place of every token that was written, drafts (red) and resets (orange)
    included.

    By the model itself: without bias, temperature and cuts. Behind the last reset that is allowed it is masked out.
    """
    if trace.reset_logprobs is None:
        raise InputError("the trace is of a model without [RESET]: there are no chances to draw")
    ids, chances = trace.token_ids, [math.exp(logprob) for logprob in trace.reset_logprobs]
    last = max((place for place, token in enumerate(ids) if token == tokenizer.reset_id), default=-1)
    colours = [
        _RESET if token == tokenizer.reset_id else _MINUS if place < last else _PLUS for place, token in enumerate(ids)
    ]
    figure, axes = _empty(0.3 * len(ids) + 1.2, 2.4)
    axes.bar(range(len(ids)), chances, color=colours)
    for text in axes.set_xticks(range(len(ids)), [_spelt(tokenizer, token) for token in ids], rotation=90, fontsize=7):
        text.label1.set_parse_math(False)
    axes.set(yscale="log", ylim=(1e-6, 1.5), ylabel=f"p({RESET})")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _kept(row: trees.TokenTrees, start: int) -> np.ndarray:
    """Indices from `start` on without the padding, whose tokens are roots that end with themselves."""
    size = row.length
    padding = (np.asarray(row.parent) == trees.NO_PARENT) & (np.asarray(row.subtree_end) == np.arange(1, size + 1))
    length = size - int(np.argmin(padding[::-1])) if not padding.all() else 0
    if not 0 <= start < length:
        raise InputError(f"start is {start}; the row has {length} tokens that can be drawn")
    return np.arange(start, length)


def _spelt(tokenizer: ChatTokenizer, token: int, longest: int = _LONGEST) -> str:
    """Returns a token as it is spelt, control tokens by their names."""
    text = tokenizer.hf.decode([int(token)], clean_up_tokenization_spaces=False).replace("\n", "↵").strip() or "␣"
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _empty(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.subplots()


def _colours(kinds: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return np.array(list(map(to_rgb, colours)))[kinds.astype(int)]


def _grid(axes, columns: int, rows: int) -> None:
    for draw, count in ((axes.axvline, columns), (axes.axhline, rows)):
        for place in range(count + 1):
            draw(place - 0.5, color="#ddd", lw=0.4)


def _write(axes, x: float, y: float, text: str, **style) -> None:
    """Writes a text that somebody else wrote: "$" in it begins no formula."""
    axes.text(x, y, text, ha="center", va="center", parse_math=False, **style)
