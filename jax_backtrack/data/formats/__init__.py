"""The formats that data come in, and the choice among them by their columns."""

from collections.abc import Iterable, Sequence

from jax_backtrack.data.formats import labelled, pairs, ranked, replies
from jax_backtrack.data.formats.format import Format, Made, Place
from jax_backtrack.data.preferences import is_blank, same_text
from jax_backtrack.errors import InputError, nearest

# The first one that fits is taken, so those that need more columns come first.
FORMATS: tuple[Format, ...] = (
    *ranked.FORMATS[:-2],
    *labelled.FORMATS,
    *pairs.FORMATS,
    *ranked.FORMATS[-2:],
    *replies.FORMATS,
)
NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))
# Columns whose text belongs to the conversation: a format that does not read one of them may not be the right one.
_CONVERSATION = frozenset(
    """
    prompt question query instruction input context conversation conversations dialog dialogue history messages
    system system_prompt post document passage
    """.split()
)

__all__ = ["FORMATS", "NAMES", "Format", "Made", "Place", "choose", "filled_columns"]


def filled_columns(rows: Iterable[dict]) -> set[str]:
    """Returns the columns in which some row holds something."""
    return {name for row in rows for name, value in row.items() if not _is_empty(value)}


def choose(rows: Sequence[dict], name: str | None, path: str) -> Format:
    """Returns the format of a file by its first rows, or the one of this name.

    Raises InputError, with the columns, where none fits, and where the one that fits leaves out a column that seems to
    hold part of the conversation.
    """
    there = {column for row in rows for column, value in row.items() if value is not None}
    fitting = [
        format for format in FORMATS if format.needs <= there and format.when(rows) and name in (None, format.name)
    ]
    if not fitting:
        raise InputError(_not_recognised(there, name, path))
    format = fitting[0]
    if name is None and (missed := _missed(rows, filled_columns(rows) - format.columns, format)):
        left = ", ".join(missed)
        raise InputError(
            f"{path}: the columns {', '.join(sorted(there))} are those of {format.name!r}, which does not read "
            f"{left}. Set data.columns.prompt (or data.columns.system) to the column that holds the prompt, or "
            f"data.format={format.name} to leave {left} out"
        )
    return format


def _not_recognised(there: set[str], name: str | None, path: str) -> str:
    shown = ", ".join(sorted(there)) or "(none)"
    if name is not None:
        needed = " or ".join(", ".join(sorted(format.needs)) for format in FORMATS if format.name == name)
        return f"{path}: the columns are {shown}; data.format={name} needs {needed}"
    return (
        f"{path}: the columns {shown} are none of a known format ({', '.join(NAMES)}). "
        "Say which column is which, as in data.columns.prompt=question; docs/DATA.md has the formats"
    )


def _missed(rows: Sequence[dict], unread: set[str], format: Format) -> list[str]:
    """Columns that seem to hold part of the conversation and are not read, unless what is read says the same."""
    missed = []
    for column in sorted(unread):
        values = [(row[column], row) for row in rows if not _is_empty(row.get(column))]
        # Where there is no column for the prompt, any other text might be it.
        suspect = column in _CONVERSATION or (
            format.needs == {"chosen", "rejected"}
            and format.name == "preference"
            and any(isinstance(value, str) and len(value.split()) > 1 for value, _ in values)
        )
        if suspect and not all(_is_said(value, row, format) for value, row in values):
            missed.append(column)
    return missed


def _is_said(value, row: dict, format: Format) -> bool:
    """Whether all texts in a value stand in columns that are read too."""
    read = list(_texts([row.get(column) for column in format.columns]))
    return all(
        is_blank(text) or any(same_text(text, one) or text.strip() in one for one in read) for text in _texts(value)
    )


def _texts(value) -> Iterable[str]:
    """All texts within lists and objects; of a message its role is none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key not in ("role", "from"):
                yield from _texts(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)


def _is_empty(value) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def unknown(name: str) -> str:
    """Returns the words for a format of a name that there is not."""
    return f"data format {name!r}: {nearest(name, NAMES)}"
