"""Reads rows of Parquet and Arrow files, whose columns have types."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from jax_backtrack.errors import InputError

# Besides what pyarrow raises of its own: texts that are not UTF-8, times out of Python's range.
_UNREADABLE = (OSError, pyarrow.ArrowException, ValueError, OverflowError)
_ARROW_FILE = b"ARROW1"  # the first bytes of Arrow's file format; its stream format, which datasets writes, has none


def parquet_objects(file: Path) -> Iterator[tuple[str, dict]]:
    """Yields the rows of a Parquet file with their places."""
    try:
        with parquet.ParquetFile(file) as table:
            yield from _rows(file, table.schema_arrow, table.iter_batches())
    except _UNREADABLE as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def arrow_objects(file: Path) -> Iterator[tuple[str, dict]]:
    """Yields the rows of an Arrow file, in its file or its stream format, with their places."""
    try:
        with pyarrow.memory_map(str(file)) as source:
            if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
                table = pyarrow.ipc.open_file(source)
                yield from _rows(file, table.schema, map(table.get_batch, range(table.num_record_batches)))
            else:
                source.seek(0)
                stream = pyarrow.ipc.open_stream(source)
                yield from _rows(file, stream.schema, stream)
    except _UNREADABLE as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _rows(file: Path, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> Iterator[tuple[str, dict]]:
    if twice := [name for name, count in Counter(schema.names).items() if count > 1]:
        raise ValueError(f"the column {twice[0]!r} stands twice")
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{file.name}, row {number}", {name: _text(value) for name, value in row.items()}
            number += 1


def _text(value):
    """Texts that a writer declared as bytes, as Spark's does, become texts again; other bytes stay as they are."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
