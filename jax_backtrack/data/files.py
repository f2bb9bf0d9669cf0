"""Rows of data sets, wherever they lie: JSON lines, JSON, Parquet, folders of `datasets.save_to_disk`, the Hub."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
from pyarrow import parquet

from jax_backtrack.data.preferences import Report
from jax_backtrack.errors import InputError, nearest

SUFFIXES = (".jsonl", ".json", ".parquet", ".gz")
_LONGEST_LINE = 2**26  # bytes: of a longer one, which a small .gz file can hold, no more is read at once
_SAVED = "state.json", "dataset_dict.json"  # of one split, of several


def rows(path: str, split: str, report: Report) -> Iterator[tuple[str, dict]]:
    """Rows of a file, a saved data set or a Hub data set with their places; what is no object is counted in `report`.

    split: of a Hub data set, and of a saved one that has several
    """
    local = _local(path)
    if local is None:
        return _hub_rows(path, split)
    if local.is_dir():
        return _saved_rows(local, split)
    if local.suffix == ".parquet":
        return _parquet_rows(local)
    return _objects(_json_values(local, report), report)


def _local(path: str) -> Path | None:
    """The file or saved data set that `path` names, or None for a Hub id."""
    local = Path(os.path.expanduser(path))  # which, unlike that of Path, leaves an unknown user's as it is
    if os.path.isfile(local) or any(os.path.isfile(local / name) for name in _SAVED):
        return local  # where a text cannot be a path, Path.is_file raises
    if (
        os.path.isdir(local)
        or path.startswith((".", "/", "~"))
        or path.endswith(SUFFIXES)
        or path.partition(":")[0].count("/") != 1
    ):
        raise InputError(
            f"{path} is no file here, no folder of datasets.save_to_disk, no Hub id (owner/name) and not 'testbed'"
        )
    return None


# ------------------------------------------------------------------------------------------------------- JSON


def _json_values(file: Path, report: Report) -> Iterator[tuple[str, object]]:
    """Values of a file of JSON lines, or of a `.json` file that is one list, with their places."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            if file.name.endswith((".json", ".json.gz")) and lines.peek(1)[:1] == b"[":
                values = json.loads(lines.read())
                yield from ((f"{file.name}, row {number}", value) for number, value in enumerate(values))
                return
            # Lines end at line feeds alone, and one that is broken is one dropped row.
            for number, line in enumerate(_lines(lines), start=1):
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
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _lines(file) -> Iterator[bytes]:
    """Lines of an open file. One that is too long ends a byte behind the limit, and the rest of it is passed over."""
    while line := file.readline(_LONGEST_LINE + 1):
        yield line
        while len(line) > _LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(_LONGEST_LINE + 1)


def _objects(values: Iterable[tuple[str, object]], report: Report) -> Iterator[tuple[str, dict]]:
    for place, value in values:
        if isinstance(value, dict):
            yield place, value
        else:
            report.drop("not a JSON object", place)


# ----------------------------------------------------------------------------------------------------- tables


def _parquet_rows(file: Path) -> Iterator[tuple[str, dict]]:
    try:
        number = 0
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    yield f"{file.name}, row {number}", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _saved_rows(folder: Path, split: str) -> Iterator[tuple[str, dict]]:
    import datasets  # takes a second, which runs without it should not cost

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{folder} cannot be read: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        if split not in table:
            raise InputError(f"{folder} has no split {split!r} (data.split): {nearest(split, table)}")
        table = table[split]
    yield from ((f"{folder.name}, row {number}", row) for number, row in enumerate(table))


def _hub_rows(path: str, split: str) -> Iterator[tuple[str, dict]]:
    import datasets  # takes a second, which runs without it should not cost

    name, _, folder = path.partition(":")
    try:
        table = datasets.load_dataset(name, data_dir=folder or None, split=split)
    except Exception as error:
        raise InputError(f"{path}: no such file here, and the Hub does not give it: {error}") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(table))
