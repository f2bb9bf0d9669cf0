"""A reply as it is written, for people who watch: words, drafts that are withdrawn, the end."""

import dataclasses
import re
from collections.abc import Iterator

from jax_backtrack.sampling.batching import ContinuousBatch, Request
from jax_backtrack.sampling.replies import Reply, Writing

# A character of a word that may go on. Scripts without spaces do not wait.
_IN_WORD = re.compile(r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\uffef\U00020000-\U0003ffff]")


@dataclasses.dataclass(frozen=True)
class TokenText:
    """What one token added to the text that is shown; a token that is shown in two steps makes two of them.

    reset_logprob: of [RESET] in the token's place, by the model itself: without bias, temperature, penalty and cuts.
                    None without `logprobs`, without [RESET], and for first words that were given
    """

    text: str
    reset_logprob: float | None


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """More of the reply: whole words and characters, and which token made what of them."""

    text: str
    pieces: tuple[TokenText, ...] = ()


@dataclasses.dataclass(frozen=True)
class Retraction:
    """Withdraws what was shown since the last `Retraction`; "" where nothing was.

    reset_logprob: of the [RESET] that was written, as in `TokenText`
    """

    shown: str
    reset_logprob: float | None = None


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end: what was shown since the last `Retraction` is the whole reply."""

    reply: Reply


Event = TextDelta | Retraction | Finished


def events(batch: ContinuousBatch, request: Request, writing: Writing, hold_back: int) -> Iterator[Event]:
    """Yields the events of one request, the only one of its batch, token by token as the loop writes them."""
    shown, ends = "", [(len(writing.text()), None)]  # what is shown, and of each token: where its text ends, [RESET]
    for (output,) in batch.run([request], steps=1):
        drafts = len(writing.draft_ids)
        writing.take(output.ids, output.done, output.logprobs, output.reset_logprobs)
        reset_logprobs = output.reset_logprobs
        chance = None if reset_logprobs is None or not len(reset_logprobs) else reset_logprobs[-1].item()
        if len(writing.draft_ids) > drafts:
            yield Retraction(shown, chance)
            shown, ends = "", []
        ends.append((len(writing.text().rstrip("\ufffd")), chance))
        text = writing.text() if writing.finish_reason else _certain(writing, hold_back)
        if text.startswith(shown) and len(text) > len(shown):
            yield TextDelta(text[len(shown) :], _pieces(text, len(shown), ends))
            shown = text
            ends = [end for end in ends if end[0] > len(shown)]
        if writing.finish_reason:
            batch.cancel(request.number)
    yield Finished(writing.reply())


def _certain(writing: Writing, hold_back: int) -> str:
    """Returns the text up to its last whole word, without what may be taken away yet."""
    text = writing.text(hold_back)
    begun = text.rstrip("\ufffd")  # what is missing of a character may complete a stop string
    return text[: min(len(_whole(text)), writing.may_stop_at(text), writing.may_stop_at(begun))]


def _whole(text: str) -> str:
    """Returns the text up to its last whole word, or without the characters at its end that lack bytes."""
    begun = text.rstrip("\ufffd")
    end = len(begun)
    while begun == text and end and _IN_WORD.match(text[end - 1]):
        end -= 1
    return text[:end]


def _pieces(text: str, start: int, ends: list[tuple[int, float | None]]) -> tuple[TokenText, ...]:
    """Returns `text[start:]` by the tokens that made it; what is no whole character at the end is the last token's."""
    pieces = []
    for number, (end, chance) in enumerate(ends, start=1):
        end = len(text) if number == len(ends) else min(end, len(text))
        if end > start:
            pieces.append(TokenText(text[start:end], chance))
            start = end
    return tuple(pieces)
