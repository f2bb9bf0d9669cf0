"""What every source of data gives: preferences, and an account of the rows that were dropped."""

import collections
import dataclasses
import functools
import unicodedata
from collections.abc import Sequence

from jax_backtrack.errors import InputError
from jax_backtrack.tokenizer.chat_tokenizer import Message
from jax_backtrack.utils.unicode import is_unicode

# Signs that show nothing though Unicode counts them among letters, symbols or marks: fillers of Hangul, the empty
# pattern of Braille, variation selectors.
_FILLERS = "\u115f\u1160\u3164\uffa0\u2800" + "".join(map(chr, range(0xFE00, 0xFE10)))


@functools.cache
def _unseen() -> str:
    """Returns white space, control characters, and characters of no width."""
    plane = map(chr, range(0x10000))
    return _FILLERS + "".join(sign for sign in plane if unicodedata.category(sign) in ("Cc", "Cf", "Zs", "Zl", "Zp"))


class NoUsableRow(InputError):
    """No row of a data source can be used. `report` is the account of its rows."""

    def __init__(self, message: str, report: "Report"):
        super().__init__(f"{message}: " + "; ".join(report.lines()))
        self.report = report


class BadRow(ValueError):
    """One row of a data source cannot be used. The message is the reason under which it is counted."""


def is_blank(text: str) -> bool:
    """Returns whether a text shows nothing: it is empty, or white space and characters of no width."""
    return not text.strip(_unseen())


def same_text(left: str, right: str) -> bool:
    """Returns whether two texts are alike but for what shows nothing at their ends."""
    return left.strip(_unseen()) == right.strip(_unseen())


class Tidied(str):
    """A text that lost white space at its ends."""


def tidy(text: str) -> str:
    """Returns a reply that stands in a field of its own, without blank lines at its ends and without the one space
    that parts it from its prompt; `Tidied` where it lost something. The indentation of its first line stays."""
    lines = text.rstrip().split("\n")
    while len(lines) > 1 and not lines[0].strip():
        del lines[0]
    tidied = "\n".join(lines)
    if tidied[:1] == " " and not tidied[1:2].isspace():
        tidied = tidied[1:]
    return text if tidied == text else Tidied(tidied)


@dataclasses.dataclass(frozen=True)
class Preference:
    """A prompt with its chosen reply and, where there is one, its rejected reply.

    `backtracks` is True where the rejected reply is unsafe: drafts of it are to be taken back. Utility data says False.
    `whole` is False where the chosen reply was cut off, so that no end of turn follows it. `origin` names the row for
    messages to the user. `tidied` is True where a reply lost white space at its ends.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None
    backtracks: bool
    origin: str
    whole: bool = True
    tidied: bool = False

    def __post_init__(self):
        if is_blank(self.chosen) or (self.rejected is not None and is_blank(self.rejected)):
            raise BadRow("a reply is empty")
        texts = [*(message["content"] for message in self.prompt), self.chosen, self.rejected or ""]
        if not all(map(is_unicode, texts)):
            raise BadRow("a text is not valid Unicode: it holds half of a surrogate pair")
        if self.rejected is not None and same_text(self.chosen, self.rejected):
            raise BadRow("chosen and rejected are the same reply")


@dataclasses.dataclass
class Report:
    """Counts the rows of a source: used, and dropped by reason with the first row that each reason hit.

    `read_as` is the format. `unused` counts, by column, the rows that hold something there that is not read; a key of a
    message stands as "messages.name". `altered` counts, by what happened, rows whose texts are not trained on as the
    file has them. `cut` counts replies of which only the beginning is used, and `unfinished` those that were cut off
    before. `notes` are other things to know, such as which files were read.
    """

    read_as: str = ""
    used: int = 0
    cut: int = 0
    unfinished: int = 0
    dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    altered: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: list[str] = dataclasses.field(default_factory=list)

    def drop(self, reason: str, origin: str) -> None:
        """Counts one dropped row."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, origin)

    def alter(self, what: str, origin: str) -> None:
        """Counts one row whose texts are changed."""
        self.altered[what] += 1
        self.first.setdefault(what, origin)

    def leave(self, column: str) -> None:
        """Counts one row that holds something in a column that is not read."""
        self.unused[column.encode(errors="backslashreplace").decode()] += 1  # a key need not be valid Unicode

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def lines(self) -> Sequence[str]:
        """Returns the account in words, one line for the used rows and one per reason."""
        dropped = [
            f"dropped {count}: {reason} (first: {self.first[reason]})" for reason, count in self.dropped.most_common()
        ]
        cut = [f"{self.cut} replies cut to data.max_response_length"] if self.cut else []
        unfinished = [f"{self.unfinished} replies end without an end of turn"] if self.unfinished else []
        altered = [f"{count} {what} (first: {self.first[what]})" for what, count in self.altered.most_common()]
        unused = [f"columns that are not read: {', '.join(sorted(self.unused))}"] if self.unused else []
        read_as = f", read as {self.read_as}" if self.read_as else ""
        rows = f"{self.used} rows used, {self.dropped.total()} dropped{read_as}"
        return [rows, *self.notes, *unused, *altered, *cut, *unfinished, *dropped]

    def account(self) -> dict:
        """Returns the account as JSON has it."""
        return {
            "read_as": self.read_as,
            "used": self.used,
            "dropped": dict(self.dropped.most_common()),
            "first": self.first,
            "unused_columns": sorted(self.unused),
            "altered": dict(self.altered.most_common()),
            "cut": self.cut,
            "unfinished": self.unfinished,
            "notes": self.notes,
        }
