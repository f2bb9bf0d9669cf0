"""What every source of data gives: preferences, and an account of the rows that were dropped."""

import collections
import dataclasses
from collections.abc import Sequence

from jax_backtrack.hub.tokenizer import Message, is_unicode


class BadRow(ValueError):
    """One row of a data source cannot be used. The message is the reason under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt with its chosen reply and, where there is one, its rejected reply.

    `backtracks` is True where the rejected reply is unsafe: drafts of it are to be taken back. Utility data says False.
    `whole` is False where the chosen reply was cut off, so that no end of turn follows it. `origin` names the row for
    messages to the user.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None
    backtracks: bool
    origin: str
    whole: bool = True

    def __post_init__(self):
        if not self.chosen.strip() or (self.rejected is not None and not self.rejected.strip()):
            raise BadRow("a reply is empty")
        texts = [*(message["content"] for message in self.prompt), self.chosen, self.rejected or ""]
        if not all(map(is_unicode, texts)):
            raise BadRow("a text is not valid Unicode: it holds half of a surrogate pair")
        if self.chosen == self.rejected:
            raise BadRow("chosen and rejected are the same reply")


@dataclasses.dataclass
class Report:
    """Counts the rows of a source: used, and dropped by reason with the first row that each reason hit.

    `cut` counts replies of which only the beginning is used, `unfinished` those that were cut off before.
    """

    used: int = 0
    cut: int = 0
    unfinished: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)

    def drop(self, reason: str, origin: str) -> None:
        """Counts one dropped row."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, origin)

    def lines(self) -> Sequence[str]:
        """The account in words, one line for the used rows and one per reason."""
        dropped = [
            f"dropped {count}: {reason} (first: {self.first[reason]})" for reason, count in self.dropped.most_common()
        ]
        cut = [f"{self.cut} replies cut to data.reply_tokens"] if self.cut else []
        unfinished = [f"{self.unfinished} replies end without an end of turn"] if self.unfinished else []
        return [f"{self.used} rows used, {self.dropped.total()} dropped", *cut, *unfinished, *dropped]
