"""Opens text files as people have them, and reads the JSON values and CSV rows in them with their places.

Files may be compressed (gzip, bzip2, xz, Zstandard; told by their first bytes, whatever the name says), in UTF-8 or
UTF-16, with or without a byte order mark, with lines that end in LF, CRLF or CR.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow

from jax_backtrack.data.preferences import Report
from jax_backtrack.errors import InputError, nearest

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_LONGEST_LINE = 2**26  # bytes: of a longer one, which a small .gz file can hold, no more is read at once
_DELIMITERS = ",;\t|"
_FIRST_LINES = 100  # that the delimiter is told by
# Keys under which a JSON document keeps its rows, beside the name of the split.
_ROWS_KEYS = ("data", "rows", "records", "examples", "instances", "items")
_UNREADABLE = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error)


def suffix(file: Path) -> str:
    """Returns the suffix that says what a file holds, in lower case: ".jsonl" of "A.JSONL.gz"."""
    suffixes = [part.lower() for part in file.suffixes]
    while suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def open_utf8(file: Path) -> Iterator[BinaryIO]:
    """Opens a text file as UTF-8 bytes without a byte order mark, decompressed.

    Raises InputError for whatever goes wrong with the file while it is open.
    """
    try:
        with _decompressed(file) as data:
            yield _as_utf8(data)
    except _UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} cannot be read: {error}") from error


def read_text(file: Path) -> str:
    """Reads a whole text file; InputError where it is not UTF-8 or UTF-16, or cannot be read."""
    with open_utf8(file) as data:
        return data.read().decode()


def _decompressed(file: Path) -> BinaryIO:
    with file.open("rb") as start:
        magic = start.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(file)
    if magic.startswith(b"BZh"):
        return bz2.open(file)
    if magic == b"\xfd7zXZ\x00":
        return lzma.open(file)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _as_utf8(data: BinaryIO) -> BinaryIO:
    start = data.peek(4)[:4]
    if start.startswith(codecs.BOM_UTF8):
        data.read(len(codecs.BOM_UTF8))
        return data
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # UTF-32 begins with the first of them too
        encoding = "utf-32" if start == codecs.BOM_UTF32_LE else "utf-16"
    elif start[1:2] == b"\0" and start[:1] != b"\0":
        encoding = "utf-16-le"
    elif start[:1] == b"\0" and start[1:2] != b"\0":
        encoding = "utf-16-be"
    else:
        return data
    return io.BufferedReader(io.BytesIO(data.read().decode(encoding).encode()))


# ------------------------------------------------------------------------------------------------------- JSON


def json_objects(file: Path, split: str, report: Report) -> Iterator[tuple[str, dict]]:
    """Yields the objects of a file of JSON lines, or of one JSON document, with their places.

    A document is a list of objects, an object of equally long columns, or an object that holds such a list under
    "data", the name of the split or the like. What is not JSON or no object is counted in `report`.
    """
    for place, value in json_values(file, split, report):
        if isinstance(value, dict):
            yield place, value
        else:
            report.drop("not a JSON object", place)


def json_values(file: Path, split: str, report: Report) -> Iterator[tuple[str, object]]:
    """Yields the values of a file as `json_objects` does, whatever they are."""
    with open_utf8(file) as data:
        start = data.peek(1)
        if start[:1].isspace() or start[:1] == b"[" or suffix(file) == ".json" or start.split(b"\n")[0].strip() == b"{":
            whole = data.read()
            values = _documents(whole, file, split, report)
            if values is not None:
                yield from ((f"{file.name}, row {number}", value) for number, value in enumerate(values))
                return
            data = io.BytesIO(whole)
        yield from _json_lines(data, file, report)


def _documents(whole: bytes, file: Path, split: str, report: Report) -> list | None:
    """Returns the rows of a JSON document, or of several that follow one another; None where these are JSON lines."""
    text = whole.decode(errors="surrogateescape").strip()
    decoder, values, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            # One object a line is JSON lines, which a single broken line does not spoil.
            if not values and isinstance(value, dict) and at < len(text) and "\n" not in text[:at]:
                return None
            values.append(value)
            while at < len(text) and text[at].isspace():
                at += 1
    except (ValueError, RecursionError):
        if text.startswith("[") and suffix(file) == ".json":
            raise
        return None
    if len(values) != 1:
        return values
    (document,) = values
    if isinstance(document, list):
        # A line that holds a list of no objects is a line.
        return document if suffix(file) == ".json" or any(isinstance(value, dict) for value in document) else None
    return _rows_of(document, file, split, report) if isinstance(document, dict) else values


def _rows_of(document: dict, file: Path, split: str, report: Report) -> list:
    """Returns the rows of a document that is one object: its own rows, or itself."""
    if not document:
        return [document]
    if all(isinstance(value, dict) and value and all(key.isdigit() for key in value) for value in document.values()):
        raise InputError(
            f"{file} holds columns of numbered objects, as DataFrame.to_json writes them: "
            "write it with orient='records', lines=True"
        )
    if any(_is_messages(value) for value in document.values()) or "instructions" in document:  # a set of prompts
        return [document]
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    rows = {key: value for key, value in lists.items() if value and all(isinstance(row, dict) for row in value)}
    for key in (split, *_ROWS_KEYS):
        if key in rows:
            left = sorted(set(document) - {key})
            if left:
                report.note(f"{file.name}: the rows are those of {key!r}; {', '.join(left)} beside it are not read")
            return rows[key]
    if len(document) == len(rows) == 1:
        (key,) = rows
        if key in ("train", "test", "validation"):
            raise InputError(f"{file} has no split {split!r} (data.split): {nearest(split, rows)}")
        return rows[key]
    if len(document) == len(rows):
        raise InputError(f"{file} holds several lists, {', '.join(rows)}: name one of them as data.split")
    if len(lists) == len(document) and len({len(value) for value in lists.values()}) == 1:
        return [dict(zip(document, values, strict=True)) for values in zip(*document.values(), strict=True)]
    return [document]


def _is_messages(value) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and ("role" in message or "from" in message) for message in value)
    )


def _json_lines(data: BinaryIO, file: Path, report: Report) -> Iterator[tuple[str, object]]:
    """Lines end at line feeds and carriage returns alone, which JSON has in no text, and a broken one is dropped."""
    number = 0
    for physical in _lines(data):
        for line in physical.rstrip(b"\r\n").split(b"\r"):
            number += 1
            place = f"{file.name}, line {number}"
            if not line.strip():
                continue
            if len(line) > _LONGEST_LINE:
                report.drop(f"a line of more than {_LONGEST_LINE // 2**20} MiB", place)
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                report.drop("not JSON", place)
                continue
            yield place, value


def _lines(data: BinaryIO) -> Iterator[bytes]:
    """Lines of an open file. One that is too long ends a byte behind the limit, and the rest of it is passed over."""
    while line := data.readline(_LONGEST_LINE + 1):
        yield line
        while len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
            line = data.readline(_LONGEST_LINE + 1)


# -------------------------------------------------------------------------------------------------------- CSV


def csv_objects(file: Path, report: Report) -> Iterator[tuple[str, dict]]:
    """Yields the rows of a table with one line of column names, with their places. What a row lacks is None.

    The columns are parted by tabs in a `.tsv` file, elsewhere by whichever of comma, semicolon, tab and bar is the most
    frequent among the names. A row of more fields than names is counted in `report`.
    """
    with open_utf8(file) as data:
        text = io.TextIOWrapper(data, encoding="utf-8", newline="")
        first = list(itertools.islice(text, _FIRST_LINES))
        csv.field_size_limit(_LONGEST_LINE)
        delimiter = "\t" if suffix(file) == ".tsv" else _delimiter(first)
        rows = csv.reader(itertools.chain(first, text), delimiter=delimiter, strict=True)
        columns, line = None, 1
        while (fields := _next_row(rows, file)) is not None:
            place, line = f"{file.name}, line {line}", rows.line_num + 1
            if columns is None:
                columns = _columns(fields, file)
            elif _names(fields) == columns:
                report.drop("a row that repeats the column names", place)
            elif len(fields) > len(columns) and any(fields[len(columns) :]):
                report.drop(f"a row of {len(fields)} fields under {len(columns)} column names", place)
            elif delimiter == "\t" and any("\t" in field and "\n" in field for field in fields):
                raise InputError(
                    f"{place}: a quotation mark opens a field that goes on over other rows: write it twice"
                )
            elif fields:
                yield place, dict.fromkeys(columns) | dict(zip(columns, fields, strict=False))


def _next_row(rows, file: Path) -> list[str] | None:
    try:
        return next(rows, None)
    except csv.Error as error:
        raise InputError(f"{file} cannot be read: {error}, in line {rows.line_num}") from None


def _columns(header: list[str], file: Path) -> list[str]:
    columns = _names(header)
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise InputError(f"{file}: the column {twice[0]!r} stands twice")
    return columns


def _names(fields: list[str]) -> list[str]:
    """Fields as names of columns, without the empty ones at the end that a spreadsheet pads its rows with."""
    names = [field.strip().strip("\ufeff") for field in fields]
    while names and not names[-1]:
        names.pop()
    return names


def _delimiter(first: list[str]) -> str:
    """Returns the sign that parts most of the first rows into as many fields as there are names, and into most."""

    def fitness(delimiter: str) -> tuple[int, int]:
        try:
            rows = [row for row in csv.reader(first, delimiter=delimiter) if row]
        except csv.Error:
            return 0, 0
        names = len(rows[0]) if rows else 0
        return (sum(len(row) == names for row in rows), names) if names > 1 else (0, 0)

    return max(_DELIMITERS, key=fitness)
