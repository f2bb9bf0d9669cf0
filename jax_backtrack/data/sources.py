"""Reads preference and SFT data in the formats that people have them in, by path or Hub id (`docs/DATA.md`)."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

from jax_backtrack.data import testbed
from jax_backtrack.data.conversations import known_keys
from jax_backtrack.data.files import rows
from jax_backtrack.data.formats import NAMES, Format, Made, Place, choose, filled_columns, unknown
from jax_backtrack.data.preferences import BadRow, NoUsableRow, Preference, Report
from jax_backtrack.errors import InputError, nearest

TESTBED = "testbed"
# Columns that `data.columns` can name, whatever they are called in the file.
COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "system", "label")
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
    report = Report()
    renamed = _renamed(rows(path, split, report, config_name), path, columns or {})
    first = list(itertools.islice(renamed, _SAMPLE))
    if not first:
        raise NoUsableRow(f"{path} has no rows that are objects", report)
    chosen = choose([row for _, row in first], format, path)
    report.read_as = chosen.name
    preferences = []
    for origin, made in _preferences(itertools.chain(first, renamed), chosen, not utility, report):
        try:
            preferences.append(made())
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
    counted = _counting_unused(numbered, format, report)
    if format.gather is not None:
        yield from format.gather(counted, report, backtracks)
        return

    def made(row: dict, at: Place) -> Preference:
        preference = format.read(row, at)
        if _is_tidied(preference, row):
            report.alter(TIDIED, at.origin)
        return preference

    for origin, row in counted:
        yield origin, lambda row=row, at=Place(origin, backtracks): made(row, at)


def _is_tidied(preference: Preference, row: dict) -> bool:
    """Whether a reply stands in a column of its own, with other white space at its ends."""
    texts = [value for value in row.values() if isinstance(value, str)]
    replies = [reply for reply in (preference.chosen, preference.rejected) if reply is not None]
    return any(reply not in texts and any(text.strip() == reply.strip() for text in texts) for reply in replies)


def _renamed(numbered: Iterator[tuple[str, dict]], path: str, columns: Mapping[str, str]) -> Iterator[tuple[str, dict]]:
    """Yields the rows with columns under the names that they have here: those of `columns`, others in lower case."""
    columns = {ours: theirs for ours, theirs in columns.items() if theirs}
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise InputError(f"data.columns.{unknown[0]}: {nearest(unknown[0], COLUMNS)}")
    first = list(itertools.islice(numbered, _SAMPLE))
    there = {name for _, row in first for name in row}
    for ours, theirs in columns.items():
        if first and theirs not in there:
            raise InputError(f"{path} has no column {theirs!r} (data.columns.{ours}): {nearest(theirs, there)}")
    lower = {name: name.strip().lower() for name in there}
    if len(set(lower.values())) < len(lower):
        lower = {}
    for origin, row in itertools.chain(first, numbered):
        named = {lower.get(name, name): value for name, value in row.items() if name not in columns.values()}
        # A column that was mapped over is there under its own name, as one that is not read.
        hidden = {f"{ours} (not mapped)": named.pop(ours) for ours in columns if ours in named}
        yield origin, named | hidden | {ours: row.get(theirs) for ours, theirs in columns.items()}


def _counting_unused(
    numbered: Iterator[tuple[str, dict]], format: Format, report: Report
) -> Iterator[tuple[str, dict]]:
    known = known_keys()
    for origin, row in numbered:
        for column in filled_columns([row]):
            if column not in format.columns:
                report.leave(column)
                continue
            value = row[column]
            messages = value if isinstance(value, list) else [value]
            messages = [one for one in messages if isinstance(one, dict) and ("role" in one or "from" in one)]
            for key in filled_columns(messages) - known:
                report.leave(f"{column}.{key}")
        yield origin, row
