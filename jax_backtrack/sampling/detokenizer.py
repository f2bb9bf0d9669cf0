"""The text of tokens that are still being written, decoded a few at a time."""

from collections.abc import Sequence

from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer


class IncrementalText:
    """Decodes a list of ids that grows, exactly as `ChatTokenizer.decode` decodes the whole list.

    The text up to some id is settled where a character ends there that no later token can change. Later ids are decoded
    after those between the last two such places, as how a token is spelt depends on whether another one stands before
    it. vLLM calls the two places `prefix_offset` and `read_offset`.
    """

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._settled, self._context = "", ""  # the texts of `ids[:read]` and of `ids[prefix:read]`
        self._prefix = self._read = 0

    def of(self, ids: Sequence[int], end: int) -> str:
        """Returns the text of `ids[:end]`; `ids` are those of the last call and maybe more, and `end` never falls."""
        text = self._tokenizer.decode(ids[self._prefix : end])
        whole = self._settled + text[len(self._context) :]
        # A run of single bytes is decoded as one: the next byte may change the characters before it.
        is_settled = len(text) > len(self._context) and not text.endswith("\ufffd")
        if is_settled and ids[end - 1] not in self._tokenizer.byte_ids:
            self._settled, self._prefix, self._read = whole, self._read, end
            self._context = self._tokenizer.decode(ids[self._prefix : end])
        return whole
