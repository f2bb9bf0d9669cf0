"""Llama Guard 2 and 3 as judges (Inan et al. 2023, arXiv 2312.06674): one pass over a conversation, no generation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from jax_backtrack.data.prompt_sets import Question
from jax_backtrack.evaluation.judges.next_token import NextToken
from jax_backtrack.hub.load import load
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message
from jax_backtrack.utils.console import progress_bar, share_bar
from jax_backtrack.utils.fingerprint import fingerprint

_KIND, _WORDS = "Llama Guard", ("safe", "unsafe")
_BEFORE = "\n\n"  # what stands before the verdict


class LlamaGuard:
    """Judges by the first token of the verdict: the share of "unsafe" in the probability of "safe" and "unsafe".

    The chat template of its tokenizer makes the question, with the categories of harm.
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, rows: int = 8):
        self.name, self._tokenizer = f"{_KIND} {fingerprint(nnx.state(model, nnx.Param))[:8]}", tokenizer
        self._next_token = NextToken(model, tokenizer, _WORDS, _KIND, rows)

    def __call__(self, questions: Sequence[Question], replies: Sequence[str]) -> np.ndarray:
        ids_of = {i: self._ids(questions[i].messages, reply) for i, reply in enumerate(replies) if reply.strip()}
        with progress_bar("judging", len(ids_of)) as advance:
            shares = self._next_token(ids_of, advance)
        return np.array([shares.get(i, 0.0) for i in range(len(replies))])

    @staticmethod
    def is_named(name: str) -> bool:
        return "/" in name or Path(name).exists()

    @classmethod
    def load(cls, name: str) -> "LlamaGuard":
        with share_bar(f"loading judge {name[-32:]}") as progress:
            return cls(*load(name, dtype="bfloat16", progress=progress))

    def _ids(self, prompt: Sequence[Message], reply: str) -> np.ndarray:
        conversation = [*prompt, {"role": "assistant", "content": reply}]
        ids, before = self._tokenizer.render(conversation), self._tokenizer.encode(_BEFORE)
        if not np.array_equal(ids[-len(before) :], before):
            ids = np.concatenate([ids, before])
        return ids
