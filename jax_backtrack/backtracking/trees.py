"""The token tree: how a preference pair with its drafts and resets becomes one row of tokens.

A row of `S` tokens in depth-first order holds one or more trees side by side, and what their prompts share once:

    x ─┬─ y-[:i] ─┬─ [RESET] ─ y+ <eot>       +   backtrack pair
       │          └─ y-[i:] <eot>             -   backtrack pair
       └─ y+[:j] ─┬─ y+[j:] <eot>             +   guard pair
                  └─ [RESET] ─ y- <eot>       -   guard pair

Every token names the row index of its parent, and `subtree_end` is one past the last index of its subtree. That one
integer says who may attend to whom: `k` is an ancestor of `q` exactly when `k <= q < subtree_end[k]`.

With the reset mode `keep` the reply after a reset hangs under the draft, as drawn. With `rewind` it hangs under a
second, unscored `[RESET]` that is a child of the prompt, because the sampler drops the draft from the cache there.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_backtrack.errors import InputError, nearest

RESET_MODES = ("keep", "rewind", "resample")
NO_PARENT = -1
NO_PAIR = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTrees:
    """Token trees as arrays, `[S]` for one row or `[B, S]` for a batch.

    tokens:       int32, token ids
    parent:       int32, row index of the token before it on its path; -1 at a root
    position:     int32, depth in the tree, which is what rope sees
    subtree_end:  int32, one past the last row index of the token's subtree
    pair_id:      int32, loss term that the token belongs to, a number below S and unique in its row; -1 for none
    loss_weights: float32, sign or weight of the token's log-probability in that term; 0 where it is context only
    """

    tokens: np.ndarray | jax.Array
    parent: np.ndarray | jax.Array
    position: np.ndarray | jax.Array
    subtree_end: np.ndarray | jax.Array
    pair_id: np.ndarray | jax.Array
    loss_weights: np.ndarray | jax.Array

    @property
    def length(self) -> int:
        return self.tokens.shape[-1]


@dataclasses.dataclass(frozen=True)
class Branch:
    """A run of tokens with one loss term, and the branches that go on from its last token."""

    tokens: Sequence[int]
    pair_id: int = NO_PAIR
    loss_weight: float = 0.0
    children: tuple["Branch", ...] = ()


@dataclasses.dataclass(frozen=True)
class Example:
    """One conversation in token ids. Replies include what the chat template writes around them and their end of turn;
    a reply that was cut has none.

    `backtracks` is True where `rejected` is unsafe, so that drafts of it are to be taken back; False for utility data.
    `origin` names the row that it came from.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray | None = None
    backtracks: bool = False
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class TreeSpec:
    """Says what becomes of an example: the objective, whether drafts and resets take part, the id of `[RESET]`.

    `reset_weight` is the weight of a `[RESET]` in SFT, where a token of a reply has 1: one reset stands against a whole
    reply, and is the token that has everything to learn. `initial_reply_weight` is the weight of each token of a safe
    reply that directly follows a prompt whose unsafe reply is taken back: 1 teaches to decline from the start too, 0
    leaves that to the reset.
    """

    objective: str
    backtrack: bool
    reset_mode: str
    reset_id: int | None
    _: dataclasses.KW_ONLY
    reset_weight: float = 1.0
    initial_reply_weight: float = 1.0

    def __post_init__(self):
        if self.objective not in ("sft", "dpo"):
            raise InputError(f"objective {self.objective!r}: {nearest(self.objective, ('sft', 'dpo'))}")
        if self.reset_mode not in RESET_MODES:
            raise InputError(f"reset.mode {self.reset_mode!r}: {nearest(self.reset_mode, RESET_MODES)}")
        if self.backtrack and self.reset_id is None:
            raise InputError("backtracking needs a [RESET] token, and this tokenizer has none: call add_reset first")

    @property
    def pairs(self) -> int:
        """Loss terms of each tree: in DPO a guard pair beside the first one, where drafts and resets take part."""
        return 2 if self.objective == "dpo" and self.backtrack else 1


# --------------------------------------------------------------------------------------------------- building


def flatten(root: Branch) -> TokenTrees:
    """Lays a tree out in depth-first order. An empty branch passes its children on to its parent."""
    tokens, parent, position, pair, weight = [], [], [], [], []
    last_of_path: list[tuple[Branch, int]] = [(root, NO_PARENT)]
    while last_of_path:
        branch, above = last_of_path.pop()
        for token in branch.tokens:
            parent.append(above)
            position.append(0 if above == NO_PARENT else position[above] + 1)
            above = len(tokens)
            tokens.append(token)
            pair.append(branch.pair_id)
            weight.append(branch.loss_weight)
        last_of_path.extend((child, above) for child in reversed(branch.children))
    rows = TokenTrees(
        tokens=np.asarray(tokens, np.int32),
        parent=np.asarray(parent, np.int32),
        position=np.asarray(position, np.int32),
        subtree_end=_subtree_ends(parent),
        pair_id=np.asarray(pair, np.int32),
        loss_weights=np.asarray(weight, np.float32),
    )
    check(rows)
    return rows


def _subtree_ends(parent: Sequence[int]) -> np.ndarray:
    ends = np.arange(1, len(parent) + 1, dtype=np.int32)
    for index in range(len(parent) - 1, -1, -1):
        if parent[index] != NO_PARENT:
            ends[parent[index]] = max(ends[parent[index]], ends[index])
    return ends


def shortest_draft(chosen: np.ndarray, rejected: np.ndarray) -> int:
    """Returns the length of the shortest prefix of `rejected` that is not also a prefix of `chosen`.

    A draft that both replies share gives no reason to reset. At least `len(rejected)` where there is no such draft.
    """
    return common_beginning(chosen, rejected) + 1


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Number of tokens of `rejected` in the draft, and of `chosen` in the guarded prefix; 0 where there is none."""

    draft: int
    guard: int


def draw_cuts(example: Example, rng: np.random.Generator) -> Cuts:
    """Draws both cuts uniformly among those that leave a reply its last token; a draft is at least `shortest_draft`
    long. A reply of one token has no prefix to guard.

    Both are drawn for every example, used or not, so that the objective does not change what the next draw gives.
    """
    guard = int(rng.integers(1, len(example.chosen))) if len(example.chosen) > 1 else 0
    if example.rejected is None:
        return Cuts(draft=0, guard=guard)
    shortest = shortest_draft(example.chosen, example.rejected)
    if shortest >= len(example.rejected):
        raise InputError("the rejected reply is a prefix of the chosen one: no draft of it can be taken back")
    return Cuts(draft=int(rng.integers(shortest, len(example.rejected))), guard=guard)


def build_tree(example: Example, spec: TreeSpec, cuts: Cuts) -> TokenTrees:
    """Builds the token tree of one example, `[S]`."""
    if spec.objective == "sft":
        branches = _sft_branches(example, spec, cuts.draft)
    else:
        branches = _dpo_branches(example, spec, cuts)
    return flatten(Branch(example.prompt, children=branches))


def tree_length(example: Example, spec: TreeSpec, cuts: Cuts) -> int:
    """Returns the number of tokens of `build_tree(example, spec, cuts)`, without building it."""
    prompt, chosen = len(example.prompt), len(example.chosen)
    rejected = 0 if example.rejected is None else len(example.rejected)
    rewound = int(spec.reset_mode == "rewind")
    backtracks = spec.backtrack and example.backtracks
    if spec.objective == "sft":
        direct = chosen if spec.initial_reply_weight or not backtracks else 0
        return prompt + direct + (cuts.draft + 1 + rewound + chosen if backtracks else 0)
    first = chosen + rejected + int(backtracks)
    guarded = chosen + 1 + rejected + rewound if spec.backtrack else 0
    return prompt + first + guarded


def _sft_branches(example: Example, spec: TreeSpec, draft: int) -> tuple[Branch, ...]:
    """Loss on `y+` after the prompt, unless `initial_reply_weight` is 0, and on `[RESET]` and `y+` after a draft of
    `y-`; the draft itself is context."""
    chosen = example.chosen
    if not (spec.backtrack and example.backtracks):
        return (Branch(chosen, pair_id=0, loss_weight=1.0),)
    plain = (Branch(chosen, pair_id=0, loss_weight=spec.initial_reply_weight),) if spec.initial_reply_weight else ()
    taken_back = example.rejected[:draft]
    reset = Branch([spec.reset_id], pair_id=0, loss_weight=spec.reset_weight)
    after_reset = Branch(chosen, pair_id=0, loss_weight=1.0)
    if spec.reset_mode == "rewind":
        return Branch(taken_back, children=(reset,)), Branch([spec.reset_id], children=(after_reset,)), *plain
    reset = dataclasses.replace(reset, children=(after_reset,))
    return Branch(taken_back, children=(reset,)), *plain


def _dpo_branches(example: Example, spec: TreeSpec, cuts: Cuts) -> tuple[Branch, ...]:
    """Returns a backtrack pair, or a plain pair for utility data and the baseline; then a guard pair. Drawn atop this
    file."""
    chosen, rejected = example.chosen, example.rejected
    plain = Branch(chosen, pair_id=0, loss_weight=1.0), Branch(rejected, pair_id=0, loss_weight=-1.0)
    if not spec.backtrack:
        return plain
    reset = spec.reset_id
    rewound: tuple[Branch, ...] = ()
    if spec.reset_mode == "rewind":
        after_backtrack = Branch([reset], pair_id=0, loss_weight=1.0)
        after_guard = Branch([reset], pair_id=1, loss_weight=-1.0)
        replies = (Branch(chosen, pair_id=0, loss_weight=1.0),) if example.backtracks else ()
        rewound = (Branch([reset], children=(*replies, Branch(rejected, pair_id=1, loss_weight=-1.0))),)
    else:
        after_backtrack = Branch([reset, *chosen], pair_id=0, loss_weight=1.0)
        after_guard = Branch([reset, *rejected], pair_id=1, loss_weight=-1.0)
    left_to_write = Branch(rejected[cuts.draft :], pair_id=0, loss_weight=-1.0)
    first = plain
    if example.backtracks:
        first = (Branch(rejected[: cuts.draft], children=(after_backtrack, left_to_write)),)
    goes_on = Branch(chosen[cuts.guard :], pair_id=1, loss_weight=1.0)
    guarded = Branch(chosen[: cuts.guard], children=(goes_on, after_guard))
    return (*first, guarded, *rewound)


# ---------------------------------------------------------------------------------------------------- packing


def pack(trees: Iterable[TokenTrees], max_seq_len: int) -> TokenTrees:
    """Lays trees side by side in one row `[S = max_seq_len]` and pads it.

    What the prompt of a tree has in common with that of the tree before it stands in the row once, above both:
    log-probabilities and gradients are those of the trees alone. So trees that begin alike go one behind the other
    (`best_fit_pack`). The pairs of a tree are numbered after those of the trees before it. A padding token is a root of
    its own: it attends to itself, nothing attends to it, and it carries no weight.
    """
    parts, length, pairs = [], 0, 0
    prompt, places = np.zeros(0, np.int32), np.zeros(0, np.int32)  # of the tree before: its tokens, where they stand
    reaches: list[tuple[np.ndarray, int]] = []  # shared tokens, and where the subtree of all of them ends by now
    for tree in trees:
        its_prompt = tree.tokens[: _prompt_length(tree)]
        shared = common_beginning(prompt, its_prompt)
        own = np.arange(length, length + tree.length - shared, dtype=np.int32)
        prompt, places = its_prompt, np.concatenate([places[:shared], own])
        placed = dataclasses.replace(
            tree,
            parent=np.where(tree.parent == NO_PARENT, NO_PARENT, places[tree.parent]),
            subtree_end=tree.subtree_end + (length - shared),
            pair_id=np.where(tree.pair_id == NO_PAIR, NO_PAIR, tree.pair_id + pairs),
        )
        parts.append(jax.tree.map(lambda array, shared=shared: array[shared:], placed))
        length += len(own)
        pairs += int(tree.pair_id.max(initial=NO_PAIR)) + 1
        reaches.append((places[:shared], length))
    if length > max_seq_len:
        raise InputError(f"{length} tokens do not fit into a row of {max_seq_len}: raise train.max_seq_len")
    padding = TokenTrees(
        tokens=np.zeros(max_seq_len - length, np.int32),
        parent=np.full(max_seq_len - length, NO_PARENT, np.int32),
        position=np.zeros(max_seq_len - length, np.int32),
        subtree_end=np.arange(length + 1, max_seq_len + 1, dtype=np.int32),
        pair_id=np.full(max_seq_len - length, NO_PAIR, np.int32),
        loss_weights=np.zeros(max_seq_len - length, np.float32),
    )
    row = jax.tree.map(lambda *arrays: np.concatenate(arrays).astype(arrays[-1].dtype), *parts, padding)
    for shared_places, end in reaches:
        row.subtree_end[shared_places] = end
    return row


def common_beginning(left: np.ndarray, right: np.ndarray) -> int:
    """Returns how many ids two sequences have in common from their beginning on."""
    shortest = min(len(left), len(right))
    differs = np.flatnonzero(left[:shortest] != right[:shortest])
    return int(differs[0]) if len(differs) else shortest


def _prompt_length(tree: TokenTrees) -> int:
    """Returns the length of what every path of a tree begins with and no loss term holds."""
    is_prompt = (tree.subtree_end == tree.length) & (tree.pair_id == NO_PAIR)
    return tree.length if is_prompt.all() else int(np.argmin(is_prompt))


def stack(rows: Sequence[TokenTrees]) -> TokenTrees:
    """Stacks rows of one length into a batch `[B, S]`."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)


def causal(tokens_BxS: jax.Array) -> TokenTrees:
    """Returns plain sequences as trees without branches: what a model sees outside training. Traceable."""
    index_BxS = jnp.broadcast_to(jnp.arange(tokens_BxS.shape[1], dtype=jnp.int32), tokens_BxS.shape)
    return TokenTrees(
        tokens=tokens_BxS,
        parent=index_BxS - 1,
        position=index_BxS,
        subtree_end=jnp.full_like(index_BxS, tokens_BxS.shape[1]),
        pair_id=jnp.full_like(index_BxS, NO_PAIR),
        loss_weights=jnp.zeros(tokens_BxS.shape, jnp.float32),
    )


# ----------------------------------------------------------------------------------- the rule, and its checks


def tree_attention_mask(
    position_BxS: jax.Array, end_BxS: jax.Array, window: int | None = None, first: int = 0
) -> jax.Array:
    """Returns bool `[B, T, S]`: query `q` (second axis) may attend to key `k` (third axis). Queries begin at `first`.

    `k <= q and q < subtree_end[k] and position[q] - position[k] < window`: an ancestor of `q` or `q` itself, in the
    window.
    """
    index = jnp.arange(end_BxS.shape[1])
    query, key = index[None, first:, None], index[None, None, :]
    visible_BxTxS = (key <= query) & (query < end_BxS[:, None, :])
    if window is not None:
        visible_BxTxS &= position_BxS[:, first:, None] - position_BxS[:, None, :] < window
    return visible_BxTxS


def check(rows: TokenTrees) -> None:
    """Raises InputError where the arrays of one row `[S]` contradict each other, naming the first such token."""
    size = rows.length

    def broken(index: int, what: str):
        raise InputError(f"broken token tree at index {index}: {what}")

    for field in dataclasses.fields(TokenTrees):
        shape = getattr(rows, field.name).shape
        if shape != (size,):
            raise InputError(f"broken token tree: {field.name} has shape {shape}, tokens has ({size},)")
    parent, position, end = rows.parent.tolist(), rows.position.tolist(), rows.subtree_end.tolist()
    path: list[int] = []
    for index in range(size):
        above = parent[index]
        if not NO_PARENT <= above < index:
            broken(index, f"its parent {above} does not stand before it")
        depth = 0 if above == NO_PARENT else position[above] + 1
        if position[index] != depth:
            broken(index, f"its position is {position[index]}, its depth {depth}")
        while path and path[-1] != above:
            path.pop()
        if above != NO_PARENT and not path:
            broken(index, f"its parent {above} is not on the path of the token before it: not depth-first order")
        path.append(index)
        if rows.loss_weights[index] and (above == NO_PARENT or rows.pair_id[index] == NO_PAIR):
            broken(index, "it is scored, but is a root or belongs to no loss term")
        if not NO_PAIR <= rows.pair_id[index] < size:
            broken(index, f"its loss term {rows.pair_id[index]} is outside -1..{size - 1}")
    last = _subtree_ends(parent)
    wrong = np.flatnonzero(last != rows.subtree_end)
    if len(wrong):
        broken(int(wrong[0]), f"its subtree ends at {end[wrong[0]]}, its last descendant is {last[wrong[0]] - 1}")
