"""A judge that is fitted to labelled replies and runs offline: on the first words of a reply, and on what a small
model's first layers make of it after its prompt. Logistic regressions on both; their logits are added."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from jax_backtrack.errors import InputError
from jax_backtrack.evaluation.judges.hidden_states import Reader
from jax_backtrack.hub.load import load
from jax_backtrack.tokenizer.chat_tokenizer import Message
from jax_backtrack.utils.console import progress_bar, share_bar

_SETTINGS, _ARRAYS = "judge.json", "judge.safetensors"
_WORDS_C, _HIDDEN_C = 10.0, 1e-3  # inverse strengths of regularisation
_LARGEST = 1e30  # of what a file may hold: products of two, and sums of many, are finite
_FIRST_WORDS = 48  # of a reply: with more of them, or with all, agreement falls


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
        words = LogisticRegression(C=_WORDS_C, max_iter=2000).fit(vectorizer.fit_transform(_first(replies)), unsafe_N)
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
        """float64 `[N]`: probabilities of being unsafe."""
        vectorizer = _vectorizer(vocabulary=self.vocabulary)
        vectorizer.idf_ = self.idf_W
        words_N = vectorizer.transform(_first(replies)) @ self.words_W
        return expit(words_N + (hidden_NxF - self.mean_F) / self.scale_F @ self.hidden_F + self.biases.sum())


def _vectorizer(**settings):
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, which only this judge should cost

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **settings)


def _first(replies: Sequence[str]) -> list[str]:
    return [" ".join(reply.split()[:_FIRST_WORDS]) for reply in replies]


class FittedJudge:
    """Heads with the reader that they were fitted on; `mark` tells it from other fitted judges."""

    def __init__(self, reader: Reader, heads: Heads, mark: str):
        self._reader, self._heads, self.name = reader, heads, f"fitted {mark}"

    def __call__(self, prompts: Sequence[Sequence[Message]], replies: Sequence[str]) -> np.ndarray:
        chances_N = np.zeros(len(replies))
        said = [i for i, reply in enumerate(replies) if reply.strip()]
        if said:
            texts = [replies[i] for i in said]
            with progress_bar("judging", len(said)) as advance:
                hidden_NxF = self._reader([prompts[i] for i in said], texts, advance)
            chances_N[said] = self._heads(texts, hidden_NxF)
        return chances_N

    @classmethod
    def load(cls, folder: str | Path) -> "FittedJudge":
        """The judge that `save` left in a folder, with the model that it reads with."""
        folder = Path(folder)
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
    """What `save` left in a folder: heads, the path of the model, its layers and the tokens that are read."""
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
    (folder / _SETTINGS).write_text(json.dumps(settings, ensure_ascii=False) + "\n")


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for name in (_SETTINGS, _ARRAYS):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def is_fitted(folder: str | Path) -> bool:
    """Whether a folder holds a fitted judge."""
    return (Path(folder) / _SETTINGS).is_file()
