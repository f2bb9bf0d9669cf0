"""From the tokens that a row writes to a reply and its drafts."""

import dataclasses
from collections.abc import Sequence

from jax_backtrack.sampling.detokenizer import IncrementalText
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class Trace:
    """Holds everything that was written, token by token, drafts and resets included.

    logprobs, reset_logprobs: of each token, and of [RESET] in its place, by the model itself: without bias,
    temperature, penalty and cuts. The latter is None for a model without [RESET].
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    reset_logprobs: tuple[float, ...] | None


@dataclasses.dataclass(frozen=True)
class Reply:
    """Holds what came of one prompt.

    text:          the reply, which is what the user sees: the text after the last reset
    drafts:        what was discarded, one text per reset
    finish_reason: "stop" where a special token other than [RESET] or a stop string ended it, "length" where it ran out
                   of room
    trace:         how likely each token was, with `SamplingParams.logprobs`
    num_tokens:    tokens that were written, drafts, resets and the end of turn included, without a prefill
    """

    text: str
    drafts: tuple[str, ...]
    finish_reason: str
    trace: Trace | None = None
    num_tokens: int = 0

    @property
    def resets(self) -> int:
        return len(self.drafts)

    def to_json(self) -> dict:
        """Returns its fields as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict) -> "Reply":
        """Returns the reply of which `to_json` gave the fields."""
        trace = fields["trace"]
        trace = trace and Trace(**{name: value and tuple(value) for name, value in trace.items()})
        return cls(**fields | {"drafts": tuple(fields["drafts"]), "trace": trace})


class Writing:
    """Collects a reply as it is written.

    prefill_ids:  its first words, where they are given
    stop_ids:     tokens that end it
    stop_strings: texts that end it; a reply ends before them
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        prefill_ids: Sequence[int] = (),
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ):
        self._tokenizer, self._stop_ids, self._stop_strings = tokenizer, frozenset(stop_ids), tuple(stop_strings)
        self.draft_ids: list[list[int]] = []
        self.ids = list(map(int, prefill_ids))  # since the last reset
        self.finish_reason: str | None = None
        self._written = 0
        self._trace: tuple[list, list, list] = [], [], []
        self._text: str | None = None  # of a reply that a stop string has cut
        self._decoders: dict[int, IncrementalText] = {}  # since the last reset, by how many tokens are held back

    def take(self, ids: Sequence[int], is_last: bool, logprobs=None, reset_logprobs=None) -> None:
        """Takes what was written since; `is_last` where the slot writes no more. Nothing counts after a stop string."""
        for place, token in enumerate(map(int, ids)):
            self._written += 1
            for traced, new in zip(self._trace, (ids, logprobs, reset_logprobs), strict=True):
                if new is not None:
                    traced.append(new[place].item())
            if token == self._tokenizer.reset_id:
                self.draft_ids.append(self.ids)
                self.ids, self._decoders = [], {}
                continue
            self.ids.append(token)
            if self._is_cut():
                self.finish_reason = "stop"
                return
        if is_last:
            self.finish_reason = "stop" if self.ids and self.ids[-1] in self._stop_ids else "length"

    def text(self, hold_back: int = 0) -> str:
        """Returns what stands since the last reset, but for its newest `hold_back` tokens."""
        if self._text is not None:
            return self._text
        end = max(0, len(self.ids) - hold_back)
        decoder = self._decoders.setdefault(hold_back, IncrementalText(self._tokenizer))
        return self._tokenizer.without_frame(
            decoder.of(self.ids, end), ended=end > 0 and self.ids[end - 1] == self._tokenizer.eot_id
        )

    def may_stop_at(self, text: str) -> int:
        """Returns where the longest end of `text` begins that may be taken away yet, or the length of `text`.

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
        """Returns the finished reply."""
        ids, logprobs, reset_logprobs = map(tuple, self._trace)
        trace = Trace(ids, logprobs, reset_logprobs or None) if logprobs else None
        drafts = tuple(map(self._tokenizer.decode_reply, self.draft_ids))
        text = self._tokenizer.decode_reply(self.ids) if self._text is None else self._text
        return Reply(text, drafts, self.finish_reason, trace, self._written)

    def _is_cut(self) -> bool:
        if not self._stop_strings:
            return False
        text = self.text()
        ends = [place for place in map(text.find, self._stop_strings) if place >= 0]
        if ends:
            self._text = text[: min(ends)]
        return bool(ends)
