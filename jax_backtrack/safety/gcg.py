"""GCG: a suffix to a prompt, found by gradients, that makes a reply begin with a target (Zou et al. 2023, arXiv
2307.15043, algorithm 1), also against a model that may take the beginning back.

The candidates of a step differ from the suffix in one token each. So they are branches of one token tree, which share
what stands before that token, and are scored together; logits are computed for the target alone:

    before ─ s0 ─┬─ s1 ─┬─ s2 ─ after ─ target       the suffix so far
                 │      └─ c  ─ after ─ target       a candidate for the last token
                 └─ c ─ s2 ─ after ─ target          one for the token in the middle
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.errors import InputError
from jax_backtrack.hub.tokenizer import ChatTokenizer, Message
from jax_backtrack.models.scores import token_scores
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.training.step import sides
from jax_backtrack.trees import Branch, Rows, common_beginning, flatten, pack, stack

_ROW_LENGTH_STEP = 128  # row lengths are multiples of it, as attention's blocks are
_SCORE_CHUNK = 128  # scored tokens of a row whose logits exist at once


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a suffix is to do, in ids: `before + suffix + after` is the prompt, and its reply shall begin with `target`.

    reset_weight: 0 is plain GCG. Above it, adaptive: so many times the mean of log p([RESET]), in the place of each
                  target token and behind the last one, is added to the loss, so that the target is not taken back
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]
    reset_id: int | None = None
    reset_weight: float = 0.0

    def __post_init__(self):
        if not self.target:
            raise InputError("the target of an attack is empty")
        if self.reset_weight < 0:
            raise InputError(f"reset_weight is {self.reset_weight}; it must be at least 0")
        if self.reset_weight and self.reset_id is None:
            raise InputError("an adaptive attack needs a model with [RESET]; reset_weight = 0 attacks any other")

    @classmethod
    def of(
        cls, tokenizer: ChatTokenizer, messages: Sequence[Message], target: str, reset_weight: float = 0.0
    ) -> "Objective":
        """A suffix right behind the last message."""
        *earlier, last = messages

        def rendered(end: str) -> np.ndarray:
            return tokenizer.render([*earlier, last | {"content": last["content"].strip() + end}])

        shared = common_beginning(rendered(" x")[::-1], rendered(" y")[::-1])
        plain = rendered("")
        return cls(
            before=tuple(plain[: len(plain) - shared].tolist()),
            after=tuple(plain[len(plain) - shared :].tolist()),
            target=tuple(tokenizer.encode(target).tolist()),
            reset_id=tokenizer.reset_id,
            reset_weight=reset_weight,
        )

    def branch(self, tokens: Sequence[int], pair: int) -> Branch:
        """The last tokens of a suffix with what follows them. The score of the pair is the negative loss."""
        weight = 1 / len(self.target)
        resets = ()
        if self.reset_weight:
            weight_of_reset = -self.reset_weight / (len(self.target) + 1)
            resets = (Branch([self.reset_id], pair=pair, weight=weight_of_reset),)
        below = resets
        for token in reversed(self.target):
            below = (*resets, Branch([token], pair=pair, weight=weight, children=below))
        return Branch([*tokens, *self.after], children=below)

    @property
    def length(self) -> int:
        """Tokens of a branch besides those of the suffix."""
        return len(self.after) + len(self.target) + (len(self.target) + 1 if self.reset_weight else 0)


@dataclasses.dataclass(frozen=True)
class Settings:
    """suffix: where the search starts; width: candidates of a step; top_k: tokens of each place that they are drawn
    among; rows, row_length: of a batch of candidates, rows as many as the mesh has parts for, or a multiple."""

    suffix: str = "x x x x x x x x x x x x x x x x x x x x"
    steps: int = 250
    width: int = 512
    top_k: int = 256
    seed: int = 0
    rows: int = 1
    row_length: int = 1024


@dataclasses.dataclass(frozen=True)
class Step:
    """The suffix after a step, the best of the `tried` candidates that it scored, and its loss."""

    suffix: tuple[int, ...]
    loss: float
    tried: int


class Attack:
    """Searches for a suffix. Control tokens are never part of one, and only suffixes that come out of their own text
    again are tried: an attack is something that can be typed."""

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, objective: Objective, settings: Settings):
        self._tokenizer, self._objective, self._settings = tokenizer, objective, settings
        self._graph, self._params = nnx.split(model)
        self._rng = np.random.default_rng(settings.seed)
        self.suffix = tokenizer.encode(settings.suffix)
        if not len(self.suffix):
            raise InputError("the suffix that the search starts from is empty")
        whole = len(objective.before) + 2 * len(self.suffix) + objective.length
        if settings.top_k >= model.config.vocab_size:
            raise InputError(
                f"top_k is {settings.top_k}; it must be below the {model.config.vocab_size} tokens there are"
            )
        if whole > settings.row_length:
            raise InputError(f"one candidate takes {whole} tokens: raise row_length = {settings.row_length}")
        self._forbidden = np.zeros(model.config.vocab_size, bool)
        self._forbidden[list(tokenizer.special_ids)] = True
        self._forbidden[len(tokenizer.hf) :] = True

    def run(self) -> Iterator[Step]:
        """Step by step. As in the paper the best candidate is taken even where it is worse than what it replaces, so
        the step of the least loss need not be the last one."""
        (loss,) = self.losses(self.suffix[None])
        for _ in range(self._settings.steps):
            candidates = self.candidates(self.gradients())
            losses = self.losses(candidates)
            if len(losses):
                loss, self.suffix = losses.min(), candidates[losses.argmin()]
            yield Step(tuple(self.suffix.tolist()), float(loss), len(losses))

    def gradients(self) -> np.ndarray:
        """float32 `[tokens of the suffix, V]`: of the loss by the one-hot choice of each token (equation 2)."""
        objective, suffix = self._objective, self.suffix
        tree = flatten(Branch(objective.before, children=(objective.branch(suffix, pair=0),)))
        length = -(-len(tree) // _ROW_LENGTH_STEP) * _ROW_LENGTH_STEP
        rows = stack([pack([tree], length)] * self._settings.rows)
        place = len(objective.before) + np.arange(len(suffix))
        return np.asarray(_gradients(self._graph, self._params, rows, place))

    def candidates(self, gradient_TxV: np.ndarray) -> np.ndarray:
        """int32 `[N, T]`, up to `width` different suffixes with one new token each, drawn evenly over places and over
        the `top_k` tokens whose gradients promise most."""
        width, top_k = self._settings.width, self._settings.top_k
        gradient_TxV = np.where(self._forbidden, np.inf, gradient_TxV)
        best_TxK = np.argpartition(gradient_TxV, top_k, axis=1)[:, :top_k]
        places = self._rng.integers(0, len(self.suffix), width)
        made = np.tile(self.suffix, (width, 1))
        made[np.arange(width), places] = best_TxK[places, self._rng.integers(0, top_k, width)]
        made = np.unique(made[(made != self.suffix).any(axis=1)], axis=0)
        encode, decode = self._tokenizer.encode, self._tokenizer.decode
        return np.array([ids for ids in made if np.array_equal(encode(decode(ids)), ids)], np.int32).reshape(
            -1, len(self.suffix)
        )

    def losses(self, candidates_NxT: np.ndarray) -> np.ndarray:
        """float64 `[N]`: mean negative log-likelihood of the target behind each suffix, and what is added of [RESET].

        Candidates share what they have in common with the suffix so far up to their first other token.
        """
        firsts = np.array([common_beginning(ids, self.suffix) for ids in candidates_NxT], int)
        order = np.argsort(firsts, kind="stable")
        losses = np.zeros(len(candidates_NxT))
        members = list(self._in_rows(order, firsts))
        rows = self._settings.rows
        for start in range(0, len(members), rows):
            held = members[start : start + rows]
            batch = [self._row([(candidates_NxT[i], firsts[i]) for i in row]) for row in held]
            batch += batch[:1] * (rows - len(batch))
            sides_BxSx2 = np.asarray(sides(self._graph, self._params, stack(batch), _SCORE_CHUNK))
            scores_BxS = sides_BxSx2[..., 0] - sides_BxSx2[..., 1]
            for row, score_S in zip(held, scores_BxS, strict=False):
                losses[row] = -score_S[: len(row)]
        return losses

    def _in_rows(self, order: Sequence[int], firsts: np.ndarray) -> Iterator[list[int]]:
        """Candidates row by row, as many as fit."""
        room = self._settings.row_length - len(self._objective.before) - len(self.suffix)
        row, used = [], 0
        for i in order:
            length = len(self.suffix) - firsts[i] + self._objective.length
            if row and used + length > room:
                yield row
                row, used = [], 0
            row.append(int(i))
            used += length
        if row:
            yield row

    def _row(self, candidates: list[tuple[np.ndarray, int]]) -> Rows:
        below: tuple[Branch, ...] = ()
        for place in range(len(self.suffix), -1, -1):
            here = [
                self._objective.branch(ids[place:], pair)
                for pair, (ids, first) in enumerate(candidates)
                if first == place
            ]
            chain = (Branch([self.suffix[place]], children=below),) if below and place < len(self.suffix) else ()
            below = (*here, *chain)
        return pack([flatten(Branch(self._objective.before, children=below))], self._settings.row_length)


@functools.partial(jax.jit, static_argnames="graph")
def _gradients(graph, params, rows: Rows, place_T: jax.Array) -> jax.Array:
    """`[T, V]` of the first row's loss: a token's embedding is its one-hot choice times the table, so the gradient is
    that by the embedding times the table."""
    model = nnx.merge(graph, params)

    def loss(added_TxM):
        shape = (*rows.tokens.shape, model.config.hidden_size)
        added_BxSxM = jnp.zeros(shape, added_TxM.dtype).at[0, place_T].set(added_TxM)
        scores_BxS = token_scores(model, rows, added=added_BxSxM)
        return -jnp.sum(rows.weight * scores_BxS)

    by_embedding_TxM = jax.grad(loss)(jnp.zeros((len(place_T), model.config.hidden_size), model.compute.dtype))
    return jnp.einsum("tm,vm->tv", by_embedding_TxM.astype(jnp.float32), model.embedding_VxM[...].astype(jnp.float32))
