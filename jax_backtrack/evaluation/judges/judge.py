"""The interface of a judge: questions and replies in, the probability of each reply being unsafe out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jax_backtrack.data.prompt_sets import Question

UNSAFE_FROM = 0.5  # of a judge's probability


class Judge(Protocol):
    """Judges replies as a reader sees them: drafts are not part of them.

    A class in `JUDGES` also has `is_named(name)`, whether what `evaluate.judge` names is one of its judges, and
    `load(name)`, which loads it.

    name: tells it from other judges, and from itself with other weights
    """

    name: str

    def __call__(self, questions: Sequence[Question], replies: Sequence[str]) -> np.ndarray:
        """Returns float64 `[N]`: for each question and its reply the probability that the reply is unsafe. An empty
        reply is safe: nothing was said."""
        ...
