"""A reply as it is written, for people who watch: words, drafts that are withdrawn, the end."""

import dataclasses
import re
from collections.abc import Iterator

from jax_backtrack.sampling.batching import Batch, Request
from jax_backtrack.sampling.replies import Reply, Writing

# A word that may go on, and a character of which some bytes are still to come. Scripts without spaces do not wait.
_UNFINISHED = re.compile(
    r"(?:[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\uffef\U00020000-\U0003ffff]+|\ufffd+)$"
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one token added to the text that is shown; a token that is shown in two steps makes two of them.

    reset_log_prob: of [RESET] in the token's place, by the model itself: without bias, temperature, penalty and cuts.
                    None without `log_probs`, without [RESET], and for first words that were given
    """

    text: str
    reset_log_prob: float | None


@dataclasses.dataclass(frozen=True)
class Token:
    """More of the reply: whole words and characters, and which token made what of them."""

    text: str
    pieces: tuple[Piece, ...] = ()


@dataclasses.dataclass(frozen=True)
class Retract:
    """What was shown since the last `Retract` is withdrawn; "" where nothing was.

    reset_log_prob: of the [RESET] that was written, as in `Piece`
    """

    shown: str
    reset_log_prob: float | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """The end: what was shown since the last `Retract` is the whole reply."""

    reply: Reply


Event = Token | Retract | Done


def events(batch: Batch, request: Request, writing: Writing, hold_back: int) -> Iterator[Event]:
    """The events of one request, which is the only one of its batch: token by token, as the loop writes them."""
    shown, made = "", [(len(writing.text()), None)]  # what is shown, and of each token: where its text ends, [RESET]
    for (update,) in batch.run([request], steps=1):
        drafts = len(writing.draft_ids)
        writing.take(update.ids, update.done, update.log_probs, update.reset_log_probs)
        written = update.reset_log_probs
        chance = None if written is None or not len(written) else written[-1].item()
        if len(writing.draft_ids) > drafts:
            yield Retract(shown, chance)
            shown, made = "", []
        made.append((len(writing.text().rstrip("\ufffd")), chance))
        text = writing.text() if writing.finish else _certain(writing, hold_back)
        if text.startswith(shown) and len(text) > len(shown):
            yield Token(text[len(shown) :], _pieces(text, len(shown), made))
            shown = text
        if writing.finish:
            batch.cancel(request.number)
    yield Done(writing.reply())


def _certain(writing: Writing, hold_back: int) -> str:
    """The text up to its last whole word, without what may be taken away yet."""
    text = writing.text(hold_back)
    begun = text.rstrip("\ufffd")  # what is missing of a character may complete a stop string
    return text[: min(len(_whole(text)), writing.may_stop_at(text), writing.may_stop_at(begun))]


def _whole(text: str) -> str:
    """The text up to its last whole word."""
    return _UNFINISHED.sub("", text)


def _pieces(text: str, start: int, made: list[tuple[int, float | None]]) -> tuple[Piece, ...]:
    """`text[start:]` by the tokens that made it. The last token's is also what is no whole character at the end."""
    pieces = []
    for number, (end, chance) in enumerate(made, start=1):
        end = len(text) if number == len(made) else min(end, len(text))
        if end > start:
            pieces.append(Piece(text[start:end], chance))
            start = end
    return tuple(pieces)
