"""A reply as it is written, for people who watch: words, drafts that are withdrawn, the end."""

import dataclasses
import re
from collections.abc import Iterator

from jax_backtrack.sampling.batch import Batch, Request
from jax_backtrack.sampling.reply import Reply, Writing

# A word that may go on, and a character of which some bytes are still to come. Scripts without spaces do not wait.
_UNFINISHED = re.compile(
    r"(?:[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\uffef\U00020000-\U0003ffff]+|\ufffd+)$"
)


@dataclasses.dataclass(frozen=True)
class Token:
    """More of the reply: whole words and characters."""

    text: str


@dataclasses.dataclass(frozen=True)
class Retract:
    """What was shown since the last `Retract` is withdrawn; "" where nothing was."""

    shown: str


@dataclasses.dataclass(frozen=True)
class Done:
    """The end: what was shown since the last `Retract` is the whole reply."""

    reply: Reply


Event = Token | Retract | Done


def events(batch: Batch, request: Request, writing: Writing, hold_back: int) -> Iterator[Event]:
    """The events of one request, which is the only one of its batch: token by token, as the loop writes them."""
    shown = ""
    for (update,) in batch.run([request], steps=1):
        drafts = len(writing.draft_ids)
        writing.take(update.ids, update.done, update.log_probs, update.reset_log_probs)
        if len(writing.draft_ids) > drafts:
            yield Retract(shown)
            shown = ""
        text = writing.text() if writing.finish else _whole(writing.text(hold_back))
        if text.startswith(shown) and len(text) > len(shown):
            yield Token(text[len(shown) :])
            shown = text
        if writing.finish:
            batch.cancel(request.number)
    yield Done(writing.reply())


def _whole(text: str) -> str:
    """The text up to its last whole word."""
    return _UNFINISHED.sub("", text)
