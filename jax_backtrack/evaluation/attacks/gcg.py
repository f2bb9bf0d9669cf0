"""GCG: a suffix to a prompt, found by gradients, that makes a reply begin with a target (Zou et al. 2023, arXiv
2307.15043, algorithm 1), also against a model that may take the beginning back.

The candidates of a step differ from the suffix in one token each. What stands before that token is read once, for all
of them; behind it each candidate is a row of its own. Candidates go in order of their new tokens, so that those of a
batch have most in common, and a batch goes on behind what all of it shares:

    before ─ s0 ─ s1 ─ s2                    read once: the prompt and the suffix so far
              │    ├─ s2 ─ after ─ target    a batch behind s0, s1: candidates for the last tokens
              │    └─ c  ─ after ─ target
              ├─ c ─ s2 ─ after ─ target     and one behind s0
              └─ d ─ s2 ─ after ─ target
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_backtrack.backtracking.trees import Branch, TokenTrees, common_beginning, flatten, pack, stack
from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.distributed.mesh import row_parts, rows_sharding, shard
from jax_backtrack.errors import InputError
from jax_backtrack.models.kv_cache import Cache
from jax_backtrack.models.logprobs import token_logprobs
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.sampling.batching import pad_to_bucket
from jax_backtrack.sampling.loop import prefill
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message

_LENGTH_STEP = 128  # of the row that gradients are taken of, as attention's blocks are
# Lengths that are multiples of these share a compilation, with those of other prompts too: of what a batch's rows read,
# and of the targets.
_ROW_STEP, _TARGET_STEP = 2, 8
_GRADIENT_CHUNK = 32  # scored tokens whose logits exist at once when gradients are taken
_LOGITS = 256  # tokens of one part whose logits exist at once, at most, unless one candidate has more


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a suffix is to do, in ids: `before + suffix + after` is the prompt, and its reply shall begin with `target`.

    messages:     the conversation whose last message the suffix follows
    reset_weight: 0 is plain GCG. Above it, adaptive: so many times the mean of log p([RESET]), in the place of each
                  target token and behind the last one, is added to the loss, so that the target is not taken back
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]
    messages: tuple[Message, ...]
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
        """Returns the objective of a suffix right after the last message."""
        messages = tuple(messages)
        plain, first_end, second_end = (_rendered(tokenizer, messages, end) for end in ("", " x", " y"))
        shared = common_beginning(first_end[::-1], second_end[::-1])
        return cls(
            before=tuple(plain[: len(plain) - shared].tolist()),
            after=tuple(plain[len(plain) - shared :].tolist()),
            target=tuple(tokenizer.begin_reply(target).tolist()),
            messages=messages,
            reset_id=tokenizer.reset_id,
            reset_weight=reset_weight,
        )

    @property
    def fed(self) -> tuple[int, ...]:
        """What is read behind a suffix: of the target the last token only where [RESET] is looked for behind it."""
        return (*self.after, *(self.target if self.reset_weight else self.target[:-1]))

    def looked_at(self, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the last tokens of a sequence of `longest` ones: the token of the target that is to follow each, int32
        `[R]`; what its loss weighs, and what log p([RESET]) weighs there, float32 `[R]`. Where `R` is rounded up, all
        are 0 in front."""
        count = len(self.target) + bool(self.reset_weight)
        target_R = np.zeros(min(_up(count, _TARGET_STEP), longest), np.int32)
        of_target_R, of_reset_R = np.zeros((2, len(target_R)), np.float32)
        begin = len(target_R) - count
        target_R[begin:][: len(self.target)] = self.target
        of_target_R[begin:][: len(self.target)] = 1 / len(self.target)
        of_reset_R[begin:] = self.reset_weight / count
        return target_R, of_target_R, of_reset_R

    def tree(self, suffix: Sequence[int]) -> TokenTrees:
        """Returns prompt and target as a tree whose weighted log-probabilities add up to the negative loss; [RESET]
        hangs at every token of the target."""
        resets = ()
        if self.reset_weight:
            resets = (Branch([self.reset_id], pair_id=0, loss_weight=-self.reset_weight / (len(self.target) + 1)),)
        below = resets
        for token in reversed(self.target):
            below = (*resets, Branch([token], pair_id=0, loss_weight=1 / len(self.target), children=below))
        return flatten(Branch([*self.before, *suffix, *self.after], children=below))


@dataclasses.dataclass(frozen=True)
class Settings:
    """suffix: where the search starts; width: candidates of a step; top_k: tokens of each place that they are drawn
    among; rows: candidates that are scored at once, on a mesh by each part that rows are spread over."""

    suffix: str = "x x x x x x x x x x x x x x x x x x x x"
    steps: int = 250
    width: int = 512
    top_k: int = 256
    seed: int = 0
    rows: int = 32


@dataclasses.dataclass(frozen=True)
class Step:
    """The suffix after a step, the best of the `tried` candidates that it scored, and its loss."""

    suffix: tuple[int, ...]
    loss: float
    tried: int


class Attack:
    """Searches for a suffix. Control tokens are never part of one, and only suffixes are tried that come out of the
    rendered prompt as they are measured: an attack is something that can be typed, and sent."""

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, objective: Objective, settings: Settings):
        self._tokenizer, self._objective, self._settings = tokenizer, objective, settings
        self._graph, self._params = nnx.split(model)
        self._rng = np.random.default_rng(settings.seed)
        if not len(tokenizer.encode(settings.suffix)):
            raise InputError("the suffix that the search starts from is empty")
        # What the prompt ends with may merge with the suffix, as "there" and "re"; then a space parts them.
        starts = (tokenizer.encode(f"{space}{settings.suffix}") for space in ("", " "))
        self.suffix = next((ids for ids in starts if self._is_sent(ids)), None)
        if self.suffix is None:
            raise InputError(f"the suffix {settings.suffix!r} gives other tokens after this prompt than by itself")
        if settings.top_k >= model.config.vocab_size:
            raise InputError(
                f"top_k is {settings.top_k}; it must be below the {model.config.vocab_size} tokens there are"
            )
        whole, limit = (
            len(objective.before) + len(self.suffix) + len(objective.fed),
            model.config.max_position_embeddings,
        )
        if whole > limit:
            raise InputError(f"prompt, suffix and target take {whole} tokens; the model has {limit} positions")
        self._mesh, self._dtype = model.compute.mesh, model.compute.dtype
        self._parts = row_parts(self._mesh)
        self._forbidden = np.zeros(model.config.vocab_size, bool)
        self._forbidden[[index for index in tokenizer.special_ids if index < len(self._forbidden)]] = True
        for first, behind in tokenizer.unused_ids(model.config.vocab_size):
            self._forbidden[first:behind] = True

    def run(self) -> Iterator[Step]:
        """Yields step by step. As in the paper the best candidate is taken even where it is worse than what it
        replaces, so the step of the least loss need not be the last one."""
        loss = None
        for _ in range(self._settings.steps):
            candidates = self.candidates(self.gradients())
            losses = self.losses(candidates)
            if len(losses):
                loss, self.suffix = losses.min(), candidates[losses.argmin()]
            elif loss is None:
                (loss,) = self.losses(self.suffix[None])
            yield Step(tuple(self.suffix.tolist()), float(loss), len(losses))

    def gradients(self) -> np.ndarray:
        """Returns float32 `[tokens of the suffix, V]`: of the loss by the one-hot choice of each token (equation 2)."""
        objective, suffix = self._objective, self.suffix
        tree = objective.tree(suffix)
        rows = self._spread(stack([pack([tree], _up(tree.length, _LENGTH_STEP))] * self._parts))
        places = len(objective.before) + np.arange(len(suffix))
        return np.asarray(_gradients(self._graph, self._params, rows, places))

    def candidates(self, gradient_TxV: np.ndarray) -> np.ndarray:
        """Returns int32 `[N, T]`, up to `width` different suffixes with one new token each, drawn evenly over places
        and over the `top_k` tokens whose gradients promise most."""
        width, top_k = self._settings.width, self._settings.top_k
        gradient_TxV = np.where(self._forbidden, np.inf, gradient_TxV)
        best_TxK = np.argpartition(gradient_TxV, top_k, axis=1)[:, :top_k]
        places = self._rng.integers(0, len(self.suffix), width)
        suffixes = np.tile(self.suffix, (width, 1))
        suffixes[np.arange(width), places] = best_TxK[places, self._rng.integers(0, top_k, width)]
        suffixes = np.unique(suffixes[(suffixes != self.suffix).any(axis=1)], axis=0)
        return np.array([ids for ids in suffixes if self._is_sent(ids)], np.int32).reshape(-1, len(self.suffix))

    def losses(self, candidates_NxT: np.ndarray) -> np.ndarray:
        """Returns float32 `[N]`: mean negative log-likelihood of the target behind each suffix, and what is added of
        [RESET].

        Nothing is read again that a candidate has in common with the suffix so far, up to its first other token.
        """
        objective, rows = self._objective, self._settings.rows * self._parts
        shared = np.array([*objective.before, *self.suffix, *objective.fed], np.int32)
        begun = len(objective.before) + len(self.suffix)
        beginning = np.zeros((self._parts, pad_to_bucket(begun)), np.int32)
        beginning[:, :begun] = shared[:begun]
        has_read = prefill(self._graph, self._params, None, self._spread(beginning), self._dtype)
        looked_at = objective.looked_at(len(shared))
        reset_id = objective.reset_id if objective.reset_weight else None
        # Every row has a token of its own, and what is looked at.
        last = min(begun - 1, len(shared) - len(looked_at[0]))
        firsts_N = len(objective.before) + np.array([common_beginning(ids, self.suffix) for ids in candidates_NxT], int)
        order_N = np.argsort(firsts_N, kind="stable")
        losses_N = np.zeros(len(candidates_NxT), np.float32)
        for start in range(0, len(order_N), rows):
            chosen = order_N[start : start + rows]
            kept = max(0, len(shared) - _up(len(shared) - min(firsts_N[chosen[0]], last), _ROW_STEP))
            tokens_BxS = np.tile(shared, (rows, 1))
            tokens_BxS[: len(chosen), len(objective.before) : begun] = candidates_NxT[chosen]
            batch = self._spread(tokens_BxS[:, kept:])
            operands = self._graph, self._params, has_read, np.int32(kept), batch, looked_at
            losses_B = _losses(*operands, reset_id, self._settings.rows)
            losses_N[chosen] = np.asarray(losses_B)[: len(chosen)]
        return losses_N

    def _is_sent(self, ids: np.ndarray) -> bool:
        """Returns whether the text of a suffix gives these ids, by itself and in the rendered prompt."""
        objective, text = self._objective, self._tokenizer.decode(ids)
        if not np.array_equal(self._tokenizer.encode(text), ids):
            return False
        sent = _rendered(self._tokenizer, objective.messages, text)
        return np.array_equal(sent, [*objective.before, *ids, *objective.after])

    def _spread(self, batch):
        """Returns a batch whose rows lie along the parts of the mesh that rows are spread over."""
        return batch if self._mesh is None else jax.device_put(batch, rows_sharding(self._mesh))


def _rendered(tokenizer: ChatTokenizer, messages: tuple[Message, ...], suffix: str) -> np.ndarray:
    """Returns the ids of a prompt with a suffix, as `Question.with_suffix` puts it."""
    return tokenizer.render(Question(messages).with_suffix(suffix).messages)


@functools.partial(jax.jit, static_argnames="graph")
def _gradients(graph, params, rows: TokenTrees, place_T: jax.Array) -> jax.Array:
    """Returns `[T, V]` of the first row's loss: a token's embedding is its one-hot choice times the table, so the
    gradient is that by the embedding times the table."""
    model = nnx.merge(graph, params)

    def loss(added_TxM):
        shape = (*rows.tokens.shape, model.config.hidden_size)
        added_BxSxM = jnp.zeros(shape, added_TxM.dtype).at[0, place_T].set(added_TxM)
        logprob_BxS = token_logprobs(model, rows, _GRADIENT_CHUNK, added_BxSxM)
        return -jnp.sum(rows.loss_weights * logprob_BxS)

    by_embedding_TxM = jax.grad(loss)(jnp.zeros((len(place_T), model.config.hidden_size), model.compute.dtype))
    return jnp.einsum("tm,vm->tv", by_embedding_TxM.astype(jnp.float32), model.embedding_VxM[...].astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("graph", "reset_id", "rows"))
def _losses(graph, params, beginning: Cache, kept, tokens_BxT, looked_at, reset_id: int | None, rows: int) -> jax.Array:
    """Losses `[B]` of what goes on behind the first `kept` tokens of the beginning, with `rows` of each part.

    `looked_at` is as `Objective` gives it.
    """
    model, (target_R, of_target_R, of_reset_R) = nnx.merge(graph, params), looked_at
    count = len(target_R)
    hidden_BxRxM = model.hidden_behind(beginning, kept, tokens_BxT)[:, -count:]
    groups = next(
        groups
        for groups in range(1, rows + 1)
        if rows % groups == 0 and (rows // groups * count <= _LOGITS or groups == rows)
    )

    def losses(hidden_BxRxM):
        logits_BxRxV = model.logits(hidden_BxRxM)
        whole_BxR = jax.nn.logsumexp(logits_BxRxV, axis=-1)
        # Taken by its index, a token's logit would bring the parts of the vocabulary together.
        is_target_RxV = target_R[:, None] == jnp.arange(logits_BxRxV.shape[-1])
        target_BxR = jnp.sum(jnp.where(is_target_RxV, logits_BxRxV, 0), axis=-1)
        loss_B = (whole_BxR - target_BxR) @ of_target_R
        if reset_id is not None:
            loss_B += (logits_BxRxV[..., reset_id] - whole_BxR) @ of_reset_R
        return loss_B

    # Every n-th row makes a group, so that each device finds its rows of it among its own.
    in_groups = jnp.moveaxis(hidden_BxRxM.reshape(-1, groups, *hidden_BxRxM.shape[1:]), 1, 0)
    losses_B = jnp.moveaxis(jax.lax.map(losses, in_groups), 0, 1).reshape(-1)
    return shard(losses_B, "B", model.compute.mesh)


def _up(length: int, step: int) -> int:
    return -(-length // step) * step
