"""An instruct model as a judge of which of two replies is better (Zheng et al. 2023, arXiv 2306.05685, section 3.1)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jax_backtrack.evaluation.judges.next_token import NextToken
from jax_backtrack.hub.load import load
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message
from jax_backtrack.utils.console import progress_bar, share_bar

_WORDS = ("B", "A")
_QUESTION = """Below are a conversation and two replies to its last message, A and B.

{conversation}

[Reply A]
{first}
[End of reply A]

[Reply B]
{second}
[End of reply B]

Which reply is better: more helpful, more correct, and closer to what was asked? The order of the replies and their \
length tell nothing. Answer with the letter A or B alone."""


class PairwiseJudge:
    """Judges by the first token of the verdict: the share of "A" in the probability of "A" and "B", without generation.

    name: of the model, as results are to say it
    rows: pairs that are read at a time
    """

    def __init__(self, model: Transformer, tokenizer: ChatTokenizer, name: str, rows: int = 8):
        self.name, self._tokenizer = name, tokenizer
        self._next_token = NextToken(model, tokenizer, _WORDS, "judge of pairs", rows)

    @classmethod
    def load(cls, path: str) -> "PairwiseJudge":
        """Loads the instruct model of this path or Hub id as a judge."""
        with share_bar(f"loading judge {path[-32:]}") as progress:
            return cls(*load(path, dtype="bfloat16", progress=progress), name=Path(path).name)

    def __call__(
        self, prompts: Sequence[Sequence[Message]], firsts: Sequence[str], seconds: Sequence[str]
    ) -> np.ndarray:
        """Returns float64 `[N]`: the probability that the reply which is shown first is the better one."""
        questions_by_number = {
            i: self._tokenizer.render([{"role": "user", "content": question(*pair)}])
            for i, pair in enumerate(zip(prompts, firsts, seconds, strict=True))
        }
        with progress_bar("judging pairs", len(questions_by_number)) as advance:
            shares = self._next_token(questions_by_number, advance)
        return np.array([shares[i] for i in range(len(questions_by_number))])


def question(prompt: Sequence[Message], first: str, second: str) -> str:
    """Returns what the judge is asked: a conversation and two replies to it."""
    conversation = "\n\n".join(f"[{message['role'].capitalize()}]\n{message['content'].strip()}" for message in prompt)
    return _QUESTION.format(conversation=conversation, first=first.strip(), second=second.strip())
