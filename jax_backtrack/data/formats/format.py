"""Defines a format of data, and what its readers share."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from jax_backtrack.data.conversations import check_conversation
from jax_backtrack.data.preferences import BadRow, Preference, Report, Tidied
from jax_backtrack.tokenizer.chat_tokenizer import Message


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a row: its name for messages, and whether the file's rejected replies are to be taken back."""

    origin: str
    backtracks: bool


# A row's place, and a function that makes its Preference or raises BadRow.
Made = tuple[str, Callable[[], Preference]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A shape of rows, told by its columns.

    needs:   columns that are not null in some row
    reads:   columns that are read besides, where they are there
    read:    makes the Preference of one row, or raises BadRow
    gather:  makes the Preferences of all rows together, where replies to one prompt stand in several rows; the last
             argument says whether rejected replies are to be taken back. One of `read` and `gather` is None
    when:    whether some first rows, which have the columns that it needs, are of this format
    inner:   keys that are read within columns of objects that are no messages, as "answers.rank"
    note:    what the account says where the format was chosen
    holds:   what a row is, for the documents
    """

    name: str
    needs: frozenset[str]
    reads: frozenset[str] = frozenset()
    read: Callable[[dict, Place], Preference] | None = None
    gather: Callable[[Iterable[tuple[str, dict]], Report, bool], Iterator[Made]] | None = None
    when: Callable[[list[dict]], bool] = lambda rows: True
    inner: frozenset[str] = frozenset()
    note: str = ""
    holds: str = ""

    @property
    def columns(self) -> frozenset[str]:
        return self.needs | self.reads


def columns(names: str) -> frozenset[str]:
    """Returns the column names of a text that holds them one after another."""
    return frozenset(names.split())


def field(row: dict, name: str):
    """Returns what a row holds in a column; BadRow where that is nothing."""
    if row.get(name) is None:
        raise BadRow(f"the field {name!r} is missing")
    return row[name]


def text(row: dict, name: str) -> str:
    """Returns the text that a row holds in a column; BadRow where it holds none."""
    value = field(row, name)
    if not isinstance(value, str):
        raise BadRow(f"the field {name!r} is not a text")
    return value


def number(row: dict, name: str) -> float:
    """Returns the number that a row holds in a column, also as a text; BadRow where it holds none."""
    value = field(row, name)
    try:
        if isinstance(value, (bool, list, dict)) or float(value) != float(value):  # NaN does not equal itself
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRow(f"the field {name!r} is not a number") from None


_TRUE = ("true", "1", "1.0", "yes", "safe")
_FALSE = ("false", "0", "0.0", "no", "unsafe")


def flag(row: dict, name: str) -> bool:
    """Returns the truth that a row holds in a column: a truth value, 0 or 1, or a word for it ("safe", "false")."""
    value = field(row, name)
    word = value.strip().lower() if isinstance(value, str) else str(value).lower()
    if isinstance(value, (str, bool, int, float)) and word in (*_TRUE, *_FALSE):
        return word in _TRUE
    raise BadRow(f"the field {name!r} is neither true nor false")


def pair(chosen: list[Message], rejected: list[Message], at: Place) -> Preference:
    """Returns the preference of two conversations that differ in their last reply."""
    for conversation in (chosen, rejected):
        check_conversation(conversation)
    for number, (left, right) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False)):
        if left != right:
            raise BadRow(f"chosen and rejected answer different prompts: they differ in message {number}")
    if len(chosen) != len(rejected):
        raise BadRow("chosen and rejected answer different prompts: they have different numbers of messages")
    question, texts = chosen[-2]["content"], [conversation[-1]["content"] for conversation in (chosen, rejected)]
    if len(question.split()) > 1 and all(text.strip().startswith(question.strip()) for text in texts):
        raise BadRow("both replies say their prompt again")
    return Preference(
        prompt=tuple(chosen[:-1]),
        chosen=str(texts[0]),
        rejected=str(texts[1]),
        backtracks=at.backtracks,
        origin=at.origin,
        tidied=any(isinstance(text, Tidied) for text in texts),
    )


def reply(conversation: list[Message], at: Place, whole: bool = True) -> Preference:
    """Returns the preference of one conversation, whose last reply has none beside it that is worse."""
    check_conversation(conversation)
    *prompt, last = conversation
    text = last["content"]
    return Preference(tuple(prompt), str(text), None, False, at.origin, whole, tidied=isinstance(text, Tidied))
