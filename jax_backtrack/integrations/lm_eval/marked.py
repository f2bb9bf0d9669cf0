"""Conversations as one string, as lm-evaluation-harness hands them on, in which text still is no control token.

The harness takes the rendered conversation as a string and has it encoded later, when nobody can tell any more whether
the template or a question spelt "<|im_end|>". So control tokens of the template carry a mark, a private character; the
same character in a text is doubled.
"""

import re
from collections.abc import Sequence

from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, Message

MARK = "\ue002"


def escape(text: str) -> str:
    """Returns a text as it stands in a marked string."""
    return text.replace(MARK, MARK + MARK)


class MarkedText:
    """Writes conversations as marked strings and reads marked strings as ids."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer, self._ids = tokenizer, tokenizer.control_ids
        self._spelt = {index: token for token, index in self._ids.items()}
        longest_first = sorted(map(re.escape, self._ids), key=len, reverse=True)
        self._pattern = re.compile(f"({MARK}(?:{'|'.join([MARK, *longest_first])}))")

    def write(self, messages: Sequence[Message], begun: str = "") -> str:
        """Returns a conversation up to where the assistant speaks, and its first words where they are given."""
        parts = self._tokenizer.render_parts(messages, begun)
        return "".join(escape(part) if isinstance(part, str) else MARK + self._spelt[part] for part in parts)

    def is_written(self, text: str) -> bool:
        """Tells whether a string has a marked control token, as every conversation has."""
        return any(part[1:] in self._ids for part in self._pattern.split(text) if part[:1] == MARK)

    def read(self, text: str) -> list[int]:
        """Ids of a marked string: what is marked is a control token, all else is text."""
        parts, run = [], ""
        for part in self._pattern.split(text):
            if part[:1] == MARK and part[1:] in self._ids:
                parts += [run, self._ids[part[1:]]]
                run = ""
            else:
                run += MARK if part == MARK + MARK else part
        return self._tokenizer.encode_parts([*parts, run]).tolist()
