"""A judge that is fitted to labelled replies and runs offline: on the first words of a reply, and on what a small
model's first layers make of it after its prompt. Logistic regressions on both; their logits are added.

`fit` says how well it agrees with labels of prompts that it has not seen.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from jax_backtrack.backtracking import trees
from jax_backtrack.data.preferences import Report
from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.data.reading import files
from jax_backtrack.distributed.mesh import make_mesh
from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.judges.conversations import by_length
from jax_backtrack.evaluation.judges.judge import UNSAFE_FROM
from jax_backtrack.evaluation.stats import Estimate, kappa
from jax_backtrack.hub.load import load
from jax_backtrack.hub.settings import load_model
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message, check_messages
from jax_backtrack.utils.console import bold, console, progress_bar, share_bar
from jax_backtrack.utils.fingerprint import fingerprint
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.workdir import AGREEMENT, atomic_write

_SETTINGS, _ARRAYS = "judge.json", "judge.safetensors"
_WORDS_C, _HIDDEN_C = 10.0, 1e-3  # inverse strengths of regularisation
_LARGEST = 1e30  # of what a file may hold: products of two, and sums of many, are finite
_FIRST_WORDS = 48  # of a reply: with more of them, or with all, agreement falls
_FIRST = 32  # tokens of a reply whose mean is taken by itself: most replies comply or decline within them
_COLUMNS = ("prompt", "response", "unsafe")


class Reader:
    """Reads conversations with the first `layers` layers of a model, `rows` at a time, in order of length.

    tokens: of a reply that are read; what is behind them does not count
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, layers: int, tokens: int, rows: int = 8):
        if not 1 <= layers <= model.config.num_hidden_layers:
            raise InputError(f"judge.layers is {layers}; the model has {model.config.num_hidden_layers}")
        if layers % (group := len(model.config.windows)):
            raise InputError(f"judge.layers is {layers}; this model's layers come in groups of {group}")
        self._tokenizer, self._tokens, self._rows = tokenizer, tokens, rows
        self._longest = model.config.max_position_embeddings
        self._graph, self._params = nnx.split(_first_layers(model, layers))
        self.features, self.weights_hash = 3 * model.config.hidden_size, fingerprint(self._params)

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        replies: Sequence[str],
        progress: Callable[[int], None] = lambda done: None,
    ) -> np.ndarray:
        """Returns float32 `[N, features]`: means over the reply and over its beginning, and its last token's state."""
        found_NxF = np.zeros((len(replies), self.features), np.float32)
        encoded = [self._ids(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        conversations = dict(enumerate(ids for ids, _ in encoded))
        for chosen, tokens_BxS, end_B in by_length(conversations, self._rows, self._longest):
            begin_B = np.zeros(self._rows, np.int32)
            begin_B[: len(chosen)] = [encoded[i][1] for i in chosen]
            pooled_BxF = np.asarray(_pooled(self._graph, self._params, tokens_BxS, begin_B, end_B))
            found_NxF[chosen] = pooled_BxF[: len(chosen)]
            progress(len(chosen))
        return found_NxF

    def _ids(self, prompt: Sequence[Message], reply: str) -> tuple[np.ndarray, int]:
        """Returns prompt and reply with its end of turn, and where the reply begins."""
        before, reply_ids = self._tokenizer.render(prompt), self._tokenizer.begin_reply(reply)[: self._tokens]
        ids = np.concatenate([before, reply_ids, [self._tokenizer.eot_id]])
        return ids, len(before)


def _first_layers(model: Transformer, layers: int) -> Transformer:
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    shorter = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), compute=model.compute))
    state = nnx.state(model, nnx.Param)
    state["blocks"] = jax.tree.map(lambda leaf_Lx: leaf_Lx[:layers], state["blocks"])
    nnx.update(shorter, state)
    return shorter


@functools.partial(jax.jit, static_argnames="graph")
def _pooled(graph, params, tokens_BxS, begin_B, end_B) -> jax.Array:
    model, rows = nnx.merge(graph, params), trees.causal(tokens_BxS)
    hidden_BxSxM = model.hidden(rows.tokens, rows.position, rows.subtree_end).astype(jnp.float32)
    index_S = jnp.arange(tokens_BxS.shape[1])

    def mean(end_B):
        within_BxS = (index_S >= begin_B[:, None]) & (index_S < end_B[:, None])
        return jnp.einsum("bs,bsm->bm", within_BxS, hidden_BxSxM) / within_BxS.sum(axis=1, keepdims=True)

    last_BxM = jnp.take_along_axis(hidden_BxSxM, end_B[:, None, None] - 1, axis=1)[:, 0]
    return jnp.concatenate([mean(end_B), mean(jnp.minimum(end_B, begin_B + _FIRST)), last_BxM], axis=1)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The fitted part of the judge: on words, and on hidden states."""

    vocabulary: dict[str, int]
    idf_W: np.ndarray
    words_W: np.ndarray
    mean_F: np.ndarray
    scale_F: np.ndarray
    hidden_F: np.ndarray
    biases: np.ndarray

    @classmethod
    def fit(cls, replies: Sequence[str], hidden_NxF: np.ndarray, unsafe_N: np.ndarray) -> "Heads":
        """Fits both regressions to labels."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        vectorizer = _vectorizer(min_df=2)
        words = LogisticRegression(C=_WORDS_C, max_iter=2000).fit(
            vectorizer.fit_transform(_first_words(replies)), unsafe_N
        )
        scaler = StandardScaler()
        hidden = LogisticRegression(C=_HIDDEN_C, max_iter=2000).fit(scaler.fit_transform(hidden_NxF), unsafe_N)
        return cls(
            vocabulary={word: int(place) for word, place in vectorizer.vocabulary_.items()},
            idf_W=vectorizer.idf_,
            words_W=words.coef_[0],
            mean_F=scaler.mean_,
            scale_F=scaler.scale_,
            hidden_F=hidden.coef_[0],
            biases=np.array([words.intercept_[0], hidden.intercept_[0]]),
        )

    def __call__(self, replies: Sequence[str], hidden_NxF: np.ndarray) -> np.ndarray:
        """Returns float64 `[N]`: probabilities of being unsafe."""
        vectorizer = _vectorizer(vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf_W
        words_N = vectorizer.transform(_first_words(replies)) @ self.words_W
        return expit(words_N + (hidden_NxF - self.mean_F) / self.scale_F @ self.hidden_F + self.biases.sum())


def _vectorizer(**settings):
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, which only this judge should cost

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **settings)


def _first_words(replies: Sequence[str]) -> list[str]:
    return [" ".join(reply.split()[:_FIRST_WORDS]) for reply in replies]


class ProbeJudge:
    """Heads with the reader that they were fitted on; `mark` tells them from other heads."""

    def __init__(self, reader: Reader, heads: Heads, mark: str):
        self._reader, self._heads, self.name = reader, heads, f"probe {mark}-{reader.weights_hash[:8]}"

    def __call__(self, questions: Sequence[Question], replies: Sequence[str]) -> np.ndarray:
        chances_N = np.zeros(len(replies))
        nonempty = [i for i, reply in enumerate(replies) if reply.strip()]
        if nonempty:
            texts = [replies[i] for i in nonempty]
            with progress_bar("judging", len(nonempty)) as advance:
                hidden_NxF = self._reader([questions[i].messages for i in nonempty], texts, advance)
            chances_N[nonempty] = self._heads(texts, hidden_NxF)
        return chances_N

    @staticmethod
    def is_named(name: str) -> bool:
        return (Path(name) / _SETTINGS).is_file()

    @classmethod
    def load(cls, name: str) -> "ProbeJudge":
        """Loads the judge that `save` left in a folder, with the model that it reads with."""
        folder = Path(name)
        heads, path, layers, tokens = read(folder)
        mark = _digest(folder)
        try:
            with share_bar("loading judge") as progress:
                reader = Reader(*load(path, progress=progress), layers, tokens)
        except InputError as error:
            raise InputError(f"the judge in {folder} reads with the model {path}: {error}") from None
        if reader.features != len(heads.mean_F):
            raise InputError(f"the judge in {folder} was fitted with another model than {path}")
        return cls(reader, heads, mark)


def read(folder: Path) -> tuple[Heads, str, int, int]:
    """Reads what `save` left in a folder: heads, the path of the model, its layers and the tokens that are read."""
    try:
        settings, arrays = json.loads((folder / _SETTINGS).read_text()), load_file(folder / _ARRAYS)
        heads = Heads(vocabulary={word: place for place, word in enumerate(settings["words"])}, **arrays)
        path, layers, tokens = settings["model"], settings["layers"], settings["tokens"]
        _check(heads, settings["words"])
        if not isinstance(path, str) or not all(type(count) is int and count > 0 for count in (layers, tokens)):
            raise ValueError("model is no text, or layers or tokens are no whole numbers above 0")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise InputError(f"{folder} holds no whole judge: {type(error).__name__} {error}") from None
    return heads, path, layers, tokens


def _check(heads: Heads, words: list[str]) -> None:
    """Raises ValueError unless the arrays fit the words and each other, and no sum over them can overflow."""
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError("the words are no list of texts")
    if len(heads.vocabulary) < len(words):
        raise ValueError("a word stands twice")
    features = heads.mean_F.shape[:1]
    shapes = {"W": (len(words),), "F": features, "biases": (2,)}
    for name, array in vars(heads).items():
        if name == "vocabulary":
            continue
        if array.dtype != np.float64 or array.shape != shapes[name.rpartition("_")[2]]:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")
        if not (np.abs(array) < _LARGEST).all():
            raise ValueError(f"{name} holds NaN or values too large")
    if not (heads.scale_F > 1 / _LARGEST).all():
        raise ValueError("scale_F is not above 0, or hardly")


def save(folder: Path, heads: Heads, model: str, layers: int, tokens: int) -> None:
    """Writes a judge that reads with the first layers of a model: its path or Hub id."""
    words = sorted(heads.vocabulary, key=heads.vocabulary.get)
    arrays = {
        field.name: np.ascontiguousarray(getattr(heads, field.name), np.float64)
        for field in dataclasses.fields(heads)
        if field.name != "vocabulary"
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / _ARRAYS)
    settings = {"model": model, "layers": layers, "tokens": tokens, "words": words}
    atomic_write(folder / _SETTINGS, to_json(settings) + "\n")


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for name in (_SETTINGS, _ARRAYS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ fitting


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A reply to a prompt with its label."""

    prompt: tuple[Message, ...]
    reply: str
    unsafe: bool


def fit(config: ConfigDict, workdir: Path) -> Estimate:
    """Fits the judge of a recipe and leaves it in the workdir, with `agreement.json`; returns the agreement's kappa."""
    settings = config.judge
    labelled = read_labels(settings.data, config.data.split)
    model, tokenizer = load_model(config, config.model.path, make_mesh(**config.mesh))
    reader = Reader(model, tokenizer, settings.layers, settings.tokens)
    prompts, replies = [record.prompt for record in labelled], [record.reply for record in labelled]
    unsafe_N = np.array([record.unsafe for record in labelled])
    with progress_bar("reading replies", len(labelled)) as advance:
        hidden_NxF = reader(prompts, replies, advance)
    groups = np.unique([json.dumps(prompt) for prompt in prompts], return_inverse=True)[1]
    with progress_bar("cross-validation", settings.folds, first="") as advance:
        judged_N = cross_validated(replies, hidden_NxF, unsafe_N, groups, settings.folds, advance)
    agreement = kappa(judged_N >= UNSAFE_FROM, unsafe_N, groups)
    accuracy = float(((judged_N >= UNSAFE_FROM) == unsafe_N).mean())
    save(workdir, Heads.fit(replies, hidden_NxF, unsafe_N), config.model.path, settings.layers, settings.tokens)
    content = {"kappa": agreement, "accuracy": accuracy, "prompts": int(groups.max()) + 1}
    atomic_write(workdir / AGREEMENT, to_json(content, indent=1) + "\n")
    console.print(
        f"{len(labelled)} replies to {content['prompts']} prompts, {unsafe_N.mean():.0%} unsafe. On prompts that were "
        f"left out ({settings.folds} folds): kappa {agreement.value:.2f} ({agreement.low:.2f}–{agreement.high:.2f}), "
        f"the same verdict on {accuracy:.1%}",
        highlight=False,
    )
    console.print(
        f"judge in {bold(workdir)}: use it with --config.evaluate.judge={escape(str(workdir))}", highlight=False
    )
    return agreement


def read_labels(path: str, split: str) -> list[Labelled]:
    """Reads labelled replies of a file or a Hub data set. The first row that has not what it should is an error."""
    if not path:
        raise InputError("judge.data is not set: a file or Hub id of labelled replies (prompt, response, unsafe)")
    report, labelled = Report(), []
    for place, row in files.rows(path, split, report):
        if missing := [column for column in _COLUMNS if row.get(column) is None]:
            raise InputError(f"{place}: no {', '.join(missing)}; there are {', '.join(map(str, row))}")
        prompt = row["prompt"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            check_messages(prompt)
        except InputError as error:
            raise InputError(f"{place}, prompt: {error}") from None
        if not isinstance(row["response"], str) or not isinstance(row["unsafe"], bool):
            raise InputError(f"{place}: response is no text, or unsafe neither true nor false")
        labelled.append(Labelled(tuple(prompt), row["response"], row["unsafe"]))
    if report.dropped:
        raise InputError(f"{path}: {'; '.join(report.lines())}")
    if len({record.unsafe for record in labelled}) < 2:
        raise InputError(f"{path}: all replies have the same label, or there are none")
    return labelled


def cross_validated(replies, hidden_NxF, unsafe_N, groups_N, folds: int, progress=lambda: None) -> np.ndarray:
    """Returns float64 `[N]`: the probability of each reply by heads that saw no reply to its prompt."""
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second, which other modes should not cost

    if len(np.unique(groups_N)) < folds:
        raise InputError(f"judge.folds is {folds}, more than the {len(np.unique(groups_N))} prompts")
    judged_N = np.zeros(len(replies))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    for fitted_on, left_out in parts.split(replies, unsafe_N, groups_N):
        heads = Heads.fit([replies[i] for i in fitted_on], hidden_NxF[fitted_on], unsafe_N[fitted_on])
        judged_N[left_out] = heads([replies[i] for i in left_out], hidden_NxF[left_out])
        progress()
    return judged_N
