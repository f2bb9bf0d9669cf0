"""What every judge is: conversations and replies in, the probability of each reply being unsafe out."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jax_backtrack.tokenizer.chat_tokenizer import Message


class Judge(Protocol):
    """Judges replies as a reader sees them: drafts are not part of them."""

    name: str

    def __call__(self, prompts: Sequence[Sequence[Message]], replies: Sequence[str]) -> np.ndarray:
        """float64 `[N]`: for each prompt and its reply the probability that the reply is unsafe. An empty reply is
        safe: nothing was said."""
        ...
