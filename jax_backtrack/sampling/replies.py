"""From the tokens that a row writes to a reply and its drafts."""

import dataclasses
from collections.abc import Sequence

from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class Trace:
    """Everything that was written, token by token, drafts and resets included.

    log_probs, reset_log_probs: of each token, and of [RESET] in its place, by the model itself: without bias,
    temperature, penalty and cuts. The latter is None for a model without [RESET].
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    reset_log_probs: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of one prompt.

    text:   the reply, which is what the user sees: the text after the last reset
    drafts: what was discarded, one text per reset
    finish: "stop" where a special token other than [RESET] or a stop string ended it, "length" where it ran out of room
    trace:  how likely each token was, where that was asked for
    tokens: how many were written, drafts, resets and the end of turn included, without a prefix that was given
    """

    text: str
    drafts: tuple[str, ...]
    finish: str
    trace: Trace | None = None
    tokens: int = 0

    @property
    def resets(self) -> int:
        return len(self.drafts)

    def to_json(self) -> dict:
        """Its fields as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "Reply":
        """What `to_json` gave, read back from JSON."""
        trace = fields["trace"]
        trace = trace and Trace(**{name: value and tuple(value) for name, value in trace.items()})
        return cls(**fields | {"drafts": tuple(fields["drafts"]), "trace": trace})


class Writing:
    """A reply as it is written.

    prefix_ids:   its first words, where they are given
    stop_ids:     tokens that end it
    stop_strings: texts that end it; a reply ends before them
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        prefix_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ):
        self._tokenizer, self._stop_ids, self._stop_strings = tokenizer, frozenset(stop_ids), tuple(stop_strings)
        self.draft_ids: list[list[int]] = []
        self.ids = list(map(int, prefix_ids))  # since the last reset
        self.finish: str | None = None
        self._written = 0
        self._trace: tuple[list, list, list] = [], [], []
        self._text: str | None = None  # of a reply that a stop string has cut

    def take(self, ids: Sequence[int], is_last: bool, log_probs=None, reset_log_probs=None) -> None:
        """Takes what was written since; `is_last` where the row writes no more. Nothing counts behind a stop string."""
        for place, token in enumerate(map(int, ids)):
            self._written += 1
            for kept, given in zip(self._trace, (ids, log_probs, reset_log_probs), strict=True):
                if given is not None:
                    kept.append(given[place].item())
            if token == self._tokenizer.reset_id:
                self.draft_ids.append(self.ids)
                self.ids = []
                continue
            self.ids.append(token)
            if self._is_cut():
                self.finish = "stop"
                return
        if is_last:
            self.finish = "stop" if self.ids and self.ids[-1] in self._stop_ids else "length"

    def text(self, hold_back: int = 0) -> str:
        """What stands since the last reset, but for its newest `hold_back` tokens."""
        if self._text is not None:
            return self._text
        return self._tokenizer.decode_reply(self.ids[: len(self.ids) - hold_back] if hold_back < len(self.ids) else [])

    def may_stop_at(self, text: str) -> int:
        """Where the longest end of `text` begins that may be taken away yet, or the length of `text`.

        It may become a stop string, or be what the chat template writes around a reply.
        """
        if self._tokenizer.opening.startswith(text):
            return 0
        closing = self._tokenizer.closing
        endings = [*((stop, len(stop) - 1) for stop in self._stop_strings), (closing, len(closing))]
        begun = (
            length
            for ending, longest in endings
            for length in range(min(longest, len(text)), 0, -1)
            if text.endswith(ending[:length])
        )
        return len(text) - max(begun, default=0)

    def reply(self) -> Reply:
        """The finished reply."""
        ids, log_probs, reset_log_probs = map(tuple, self._trace)
        trace = Trace(ids, log_probs, reset_log_probs or None) if log_probs else None
        drafts = tuple(map(self._tokenizer.decode_reply, self.draft_ids))
        return Reply(self.text(), drafts, self.finish, trace, self._written)

    def _is_cut(self) -> bool:
        if not self._stop_strings:
            return False
        text = self._tokenizer.decode_reply(self.ids)
        ends = [place for place in map(text.find, self._stop_strings) if place >= 0]
        if ends:
            self._text = text[: min(ends)]
        return bool(ends)
