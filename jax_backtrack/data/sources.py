"""Reads preference and SFT data in the formats that people have them in, by path or Hub id (`docs/DATA.md`)."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from jax_backtrack.data import testbed
from jax_backtrack.data.conversations import KNOWN_KEYS, ROLE_KEYS
from jax_backtrack.data.formats import LABELS, NAMES, NOT_MAPPED, Format, Made, Place, choose, unknown
from jax_backtrack.data.preferences import BadRow, NoUsableRow, Preference, Report
from jax_backtrack.data.reading.columns import filled_columns, lower_names
from jax_backtrack.data.reading.files import rows
from jax_backtrack.data.settings import COLUMNS
from jax_backtrack.errors import InputError, nearest

TESTBED = "testbed"
_MEDIA = {"image", "images", "video", "videos", "audio", "audios"}  # columns that are no text
TIDIED = "rows with white space left out at the ends of a reply"
_SAMPLE = 500  # first rows that the format is told by


def read(
    path: str,
    *,
    utility: bool = False,
    split: str = "train",
    format: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    config_name: str = "",
) -> tuple[list[Preference], Report]:
    """Reads up to `limit` preferences and the account of what was dropped.

    path:        as `files.rows` takes it, or "testbed"
    utility:     the rejected replies are worse, not unsafe; nothing of them is to be taken back
    split:       of a Hub data set, of a folder that has several, or of the testbed
    format:      one of `formats.NAMES`; told by the columns of the first rows if None
    columns:     the file's names of columns, by the names that they have here (`COLUMNS`)
    config_name: of a Hub data set that has several configurations

    Raises InputError, naming the columns, for rows of no known format, and where no row can be used.
    """
    if format is not None and format not in NAMES:
        raise InputError(unknown(format))
    if path == TESTBED:
        preferences = [question.preference() for question in testbed.questions(split, limit or 1000)]
        if utility:
            preferences = [dataclasses.replace(preference, backtracks=False) for preference in preferences]
        return preferences, Report(read_as=TESTBED, used=len(preferences))
    report, mapped = Report(), _checked_columns(columns)
    renamed = _renamed(rows(path, split, report, config_name), path, mapped)
    first = list(itertools.islice(renamed, _SAMPLE))
    if not first:
        raise NoUsableRow(f"{path} has no rows that are objects", report)
    chosen = choose([row for _, row in first], format, path, mapped)
    report.read_as = chosen.name
    if chosen.note:
        report.note(chosen.note)
    preferences = []
    for origin, read_preference in _preferences(itertools.chain(first, renamed), chosen, not utility, report):
        try:
            preferences.append(read_preference())
            if preferences[-1].tidied:
                report.alter(TIDIED, origin)
        except BadRow as reason:
            report.drop(str(reason), origin)
        if len(preferences) == limit:
            break
    report.used = len(preferences)
    if not preferences:
        raise NoUsableRow(f"{path} gives no usable row", report)
    return preferences, report


def _preferences(
    numbered: Iterator[tuple[str, dict]], format: Format, backtracks: bool, report: Report
) -> Iterator[Made]:
    """Yields each row's place with a function that makes its Preference or raises BadRow."""
    rows = _checked(_counting_unused(numbered, format, report), report)
    if format.gather is not None:
        yield from format.gather(rows, report, backtracks)
        return
    for origin, row in rows:
        yield origin, lambda row=row, at=Place(origin, backtracks): format.read(row, at)


def _checked(numbered: Iterator[tuple[str, dict]], report: Report) -> Iterator[tuple[str, dict]]:
    """Yields the rows that hold no pictures or sound, and a label where others have one; the rest is counted."""
    labels: set[str] = set()
    for origin, row in numbered:
        filled = filled_columns([row])
        labels |= filled & {*LABELS}
        if media := sorted(filled & _MEDIA):
            report.drop(f"the field {media[0]!r} holds what is no text", origin)
        elif missing := sorted(labels - filled):
            report.drop(f"the field {missing[0]!r} is missing", origin)
        else:
            yield origin, row


def _renamed(numbered: Iterator[tuple[str, dict]], path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, dict]]:
    """Yields the rows with columns under the names that they have here: those of `columns`, others in lower case."""
    first = list(itertools.islice(numbered, _SAMPLE))
    present = {name for _, row in first for name in row}
    for ours, theirs in columns.items():
        if first and theirs not in present:
            raise InputError(f"{path} has no column {theirs!r} (data.columns.{ours}): {nearest(theirs, present)}")
    lower = lower_names(present)
    for origin, row in itertools.chain(first, numbered):
        named = {lower.get(name, name): value for name, value in row.items() if name not in columns.values()}
        # A column that was mapped over is there under its own name, as one that is not read.
        hidden = {f"{ours}{NOT_MAPPED}": named.pop(ours) for ours in columns if ours in named}
        yield origin, named | hidden | {ours: row.get(theirs) for ours, theirs in columns.items()}


def _checked_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Returns the columns that are named; InputError for a name that is none of ours, and for a column that is named
    twice."""
    named = {ours: theirs for ours, theirs in (columns or {}).items() if theirs}
    for ours, theirs in named.items():
        if ours not in COLUMNS:
            raise InputError(f"data.columns.{ours}: {nearest(ours, COLUMNS)}")
        if twice := [column for column in named if column != ours and named[column] == theirs]:
            raise InputError(f"data.columns.{ours} and data.columns.{twice[0]} are the same column {theirs!r}")
    return named


def _counting_unused(
    numbered: Iterator[tuple[str, dict]], format: Format, report: Report
) -> Iterator[tuple[str, dict]]:
    for origin, row in numbered:
        for column in filled_columns([row]):
            if column not in format.columns:
                report.leave(column)
            else:
                for key in _unread_keys(column, row[column], format):
                    report.leave(key)
        yield origin, row


def _unread_keys(path: str, value, format: Format) -> set[str]:
    """Keys within a column that hold something that is not read, each with the path to it."""
    if isinstance(value, list):
        return {key for entry in value if isinstance(entry, dict) for key in _unread_keys(path, entry, format)}
    if not isinstance(value, dict):
        return set()
    filled = filled_columns([value])
    if filled & ROLE_KEYS:
        return {f"{path}.{key}" for key in filled - KNOWN_KEYS}
    if not any(key.startswith(f"{path}.") for key in format.inner):
        return set()
    within = {key: f"{path}.{key}" for key in filled}
    unread = {name for name in within.values() if name not in format.inner}
    return unread.union(*(_unread_keys(name, value[key], format) for key, name in within.items() if name not in unread))
