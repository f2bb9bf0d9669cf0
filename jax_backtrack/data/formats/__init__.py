"""The formats that data come in, and the choice among them by their columns."""

import re
from collections.abc import Collection, Iterable, Sequence

from jax_backtrack.data.formats import labelled, pairs, ranked, replies
from jax_backtrack.data.formats.format import Format, Made, Place
from jax_backtrack.data.preferences import is_blank, same_text
from jax_backtrack.data.reading.columns import filled_columns, is_empty
from jax_backtrack.errors import InputError, nearest

# The first one that fits is taken, so those that need more columns come first.
FORMATS: tuple[Format, ...] = (
    *ranked.BY_MANY_COLUMNS,
    *labelled.FORMATS,
    *pairs.FORMATS,
    *ranked.BY_FEW_COLUMNS,
    *replies.FORMATS,
)
NAMES = tuple(dict.fromkeys(format.name for format in FORMATS))
LABELS = replies.LABELS

NOT_MAPPED = " (not mapped)"  # ends the name of a column in whose place another one was named
# Columns whose text belongs to the conversation: a format that does not read one of them may not be the right one.
_CONVERSATION = frozenset(
    """
    prompt question query instruction input context conversation conversations dialog dialogue history messages
    system system_prompt post document passage
    """.split()
)
# Words of column names of the same kind, and last words of names that only tell something about such a column.
_CONVERSATION_WORDS = _CONVERSATION | {"sys", "user", "human"}
_ABOUT = frozenset(
    """
    id ids source sources hash category categories lang language length type name label labels tokens count index num
    score scores model style domain topic subset split version date origin dataset kind level template templates format
    """.split()
)
_REPLIES = frozenset("chosen rejected rejected_response rejected_messages completion response output".split())
_LABEL = re.compile(r"safe|harm|toxic|label|kto_tag|refus|flagged|violat")
_LABEL_VALUES = frozenset(
    "true false 0 1 0.0 1.0 yes no safe unsafe harmful unharmful toxic refusal compliance".split()
)

__all__ = ["FORMATS", "LABELS", "NAMES", "NOT_MAPPED", "Format", "Made", "Place", "choose", "unknown"]


def choose(rows: Sequence[dict], name: str | None, path: str, mapped: Collection[str] = ()) -> Format:
    """Returns the format of a file by its first rows, or the one of this name.

    mapped: columns that the user named as such

    Raises InputError, with the columns, where none fits, where the one that fits does not read a column that was named,
    and where it leaves out one that seems to hold part of the conversation, a reply or a label.
    """
    columns = {column for row in rows for column, value in row.items() if value is not None}
    fitting = [
        format
        for format in FORMATS
        if format.needs <= columns and (format.when(rows) if name is None else format.name == name)
    ]
    if not fitting:
        raise InputError(_not_recognised(columns, name, path))
    format = fitting[0]
    if lost := sorted(set(mapped) - format.columns):
        raise InputError(
            f"data.columns.{lost[0]}: the other columns of {path} are those of {format.name!r}, which has no {lost[0]}"
        )
    if name is None and (missed := _missed(rows, filled_columns(rows) - format.columns, format)):
        left = ", ".join(missed)
        raise InputError(
            f"{path}: the columns {', '.join(sorted(columns))} are those of {format.name!r}, which does not read "
            f"{left}. Set data.columns.prompt (or another of data.columns) to the column that is meant, or "
            f"data.format={format.name} to leave {left} out"
        )
    return format


def unknown(name: str) -> str:
    """Returns the words for a format of a name that there is not."""
    return f"data format {name!r}: {nearest(name, NAMES)}"


def _not_recognised(columns: set[str], name: str | None, path: str) -> str:
    shown = ", ".join(sorted(columns)) or "(none)"
    if name is not None:
        needed = " or ".join(", ".join(sorted(format.needs)) for format in FORMATS if format.name == name)
        return f"{path}: the columns are {shown}; data.format={name} needs {needed}"
    return (
        f"{path}: the columns {shown} are none of a known format ({', '.join(NAMES)}). "
        "Say which column is which, as in data.columns.prompt=question; docs/DATA.md has the formats"
    )


def _missed(rows: Sequence[dict], unread: set[str], format: Format) -> list[str]:
    """Returns unread columns that, by these rows, seem to hold part of the conversation, a reply or a label.

    A column that says what is read as well is none of them.
    """
    missed = []
    for column in sorted(name for name in unread if not name.endswith(NOT_MAPPED)):
        values = [(row[column], row) for row in rows if not is_empty(row.get(column))]
        is_label = _is_label(column, [value for value, _ in values], format)
        is_suspect = _is_suspect(column, values, format)
        if is_label or (is_suspect and not all(_is_said(value, row, format) for value, row in values)):
            missed.append(column)
    return missed


def _is_label(column: str, values: Sequence, format: Format) -> bool:
    """Returns whether a column says of replies whether they are wanted; labelled formats have others."""
    if format in labelled.FORMATS or not _LABEL.search(column):
        return False
    return all(isinstance(value, (bool, int, float, str)) and str(value).lower() in _LABEL_VALUES for value in values)


def _is_suspect(column: str, values: Sequence[tuple[object, dict]], format: Format) -> bool:
    if column in _CONVERSATION or ("rejected" not in format.columns and column in _REPLIES):
        return format.gather is None or column not in _REPLIES
    words = re.split(r"[^a-z]+", column.strip("_"))
    has_text = any(not isinstance(value, str) or len(value.split()) > 1 for value, _ in values)
    if has_text and _CONVERSATION_WORDS & {*words} and words[-1] not in _ABOUT:
        return any(isinstance(value, (str, list)) for value, _ in values)
    # Where there is no column for the prompt, any other text might be it.
    is_alone = format.needs == {"chosen", "rejected"} and format.name == "preference"
    return is_alone and any(
        isinstance(value, str) and len(value.split()) > 1 and isinstance(row.get("chosen"), str)
        for value, row in values
    )


def _is_said(value, row: dict, format: Format) -> bool:
    """Returns whether all texts in a value stand in columns that are read too."""
    read_texts = list(_texts([row.get(column) for column in format.columns]))
    return all(is_blank(text) or any(_says(read_text, text) for read_text in read_texts) for text in _texts(value))


def _says(whole: str, text: str) -> bool:
    text = text.strip()
    return (
        same_text(text, whole)
        or text in map(str.strip, whole.splitlines())
        or (len(text.split()) > 3 and text in whole)
    )


def _texts(value) -> Iterable[str]:
    """Yields all texts within lists and objects; of a message its role is none."""
    values = [value]  # not by recursion: JSON may be nested deeper than Python calls
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            values += [entry for key, entry in value.items() if key not in ("role", "from")]
        elif isinstance(value, (list, tuple)):
            values += value
