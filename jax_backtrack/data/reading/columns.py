"""Names of columns, and whether they hold something: what readers of data and of prompts both ask of a row."""

from collections.abc import Collection, Iterable


def is_empty(value) -> bool:
    """Returns whether a column holds nothing: null, or an empty text, list or object."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def filled_columns(rows: Iterable[dict]) -> set[str]:
    """Returns the columns in which some row holds something."""
    return {name for row in rows for name, value in row.items() if not is_empty(value)}


def lower_names(names: Collection[str]) -> dict[str, str]:
    """Returns the names in lower case, by what they are; none of them where two would become one."""
    lower = {name: name.strip().lower() if isinstance(name, str) else name for name in names}
    return lower if len(set(lower.values())) == len(lower) else {}
