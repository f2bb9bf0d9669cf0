"""Finds the rows of a data set, wherever they lie: files, folders, the Hub."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from jax_backtrack.data.preferences import Report
from jax_backtrack.data.reading.tables import arrow_objects, parquet_objects
from jax_backtrack.data.reading.text_files import COMPRESSIONS, csv_objects, json_objects, suffix
from jax_backtrack.errors import InputError, nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_SAVED = "state.json", "dataset_dict.json"  # of datasets.save_to_disk: of one split, of several
_LFS = b"version https://git-lfs"  # begins a file that stands for one which Git LFS keeps elsewhere
# Files that a data set's folder has beside its data.
_NO_DATA = ("README.md", "LICENSE", "dataset_infos.json", "dataset_info.json")


def split_paths(path: str) -> list[str]:
    """Returns the paths that `path` names: several are parted by commas, unless there is a file of the whole name."""
    parts, paths = path.split(","), []
    while parts:
        # The most parts that are one path of this machine; a name may have a comma.
        count = next((n for n in range(len(parts), 1, -1) if _exists(",".join(parts[:n]).strip())), 1)
        paths.append(",".join(parts[:count]).strip())
        del parts[:count]
    return [part for part in paths if part] or [path]


def rows(path: str, split: str, report: Report, config_name: str = "") -> Iterator[tuple[str, dict]]:
    """Yields the rows of a data set with their places; what is no row is counted in `report`.

    path:        a file, a pattern of files ("data/*.jsonl"), a folder of files, one of `datasets.save_to_disk`, a clone
                 of a Hub repository, or a Hub id ("owner/name", or "owner/name:folder")
    split:       of a Hub data set, and of a folder or a JSON document that has several
    config_name: of a Hub data set, or of its clone, that has several configurations
    """
    local = Path(os.path.expanduser(path))  # which, unlike that of Path, leaves an unknown user's as it is
    if os.path.isfile(local):  # where a text cannot be a path, Path.is_file raises
        return _file_rows(local, split, report)
    if any(os.path.isfile(local / name) for name in _SAVED):
        return _saved_rows(local, split)
    if os.path.isdir(local):
        return _folder_rows(local, split, report, config_name)
    if glob.has_magic(path):
        return _matching_rows(str(local), path, split, report)
    if path.startswith((".", "/", "~")) or path.lower().endswith((*SUFFIXES, *COMPRESSIONS)) or not _is_hub_id(path):
        raise InputError(f"{path} is no file or folder here, no Hub id (owner/name) and not 'testbed'")
    return _hub_rows(path, split, config_name)


def _exists(path: str) -> bool:
    path = os.path.expanduser(path)
    return "\0" not in path and (os.path.exists(path) or bool(glob.has_magic(path) and glob.glob(path)))


def _is_hub_id(path: str) -> bool:
    return path.partition(":")[0].count("/") == 1


def _file_rows(file: Path, split: str, report: Report) -> Iterator[tuple[str, dict]]:
    kind = suffix(file)
    with open(file, "rb") as start:
        magic = start.read(len(_LFS))
    if magic == _LFS:
        raise InputError(f"{file} is a pointer of Git LFS, not the data: `git lfs pull` in its clone brings it")
    if magic.startswith(b"PAR1") or kind == ".parquet":
        return parquet_objects(file)
    if magic.startswith(b"ARROW1") or kind == ".arrow":
        return arrow_objects(file)
    if kind in (".csv", ".tsv"):
        return csv_objects(file, report)
    return json_objects(file, split, report)


def _matching_rows(pattern: str, shown: str, split: str, report: Report) -> Iterator[tuple[str, dict]]:
    matches = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in matches if path.is_file()]
    if not files:
        raise InputError(f"{shown}: no file has such a name")
    if folders := [path.name for path in matches if path.is_dir()]:
        report.note(f"{len(folders)} folders of such a name are not read: {_some(folders)}")
    report.note(f"{len(files)} files: {_some([file.name for file in files])}")
    return _all_rows(files, split, report)


def _all_rows(files: list[Path], split: str, report: Report) -> Iterator[tuple[str, dict]]:
    for file in files:
        yield from _file_rows(file, split, report)


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# ----------------------------------------------------------------------------------------------------- folders


def _folder_rows(folder: Path, split: str, report: Report, config_name: str) -> Iterator[tuple[str, dict]]:
    """Reads the files that `datasets` takes for the split: by the README's configurations, or by their names."""
    import datasets  # takes a second, which runs without it should not cost

    try:
        names = datasets.get_dataset_config_names(str(folder))
        if config_name not in ("", *names):
            raise InputError(f"{folder} has no configuration {config_name!r} (data.config_name): {_one_of(names)}")
        if not config_name and len(names) > 1 and "default" not in names:
            raise InputError(f"{folder} has several configurations: choose data.config_name: {_one_of(names)}")
        files_by_split = datasets.load_dataset_builder(str(folder), config_name or None).config.data_files
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: no data files are found in this folder: {error}") from error
    splits = {str(name): [Path(file) for file in files] for name, files in (files_by_split or {}).items()}
    if split not in splits:
        raise InputError(f"{folder} has no split {split!r} (data.split): {nearest(split, splits)}")
    files = splits[split]
    report.note(f"{len(files)} files of split {split!r}: {_some([file.name for file in files])}")
    if unread := _unread(folder, splits):
        report.note(f"{len(unread)} files in the folder are not read: {_some(unread)}")
    return _all_rows(files, split, report)


def _one_of(names) -> str:
    return ", ".join(sorted(names))


def _unread(folder: Path, splits: dict[str, list[Path]]) -> list[str]:
    """Files of the folder that belong to none of the splits, but for hidden ones and those about the data."""
    read_files = {file.resolve() for files in splits.values() for file in files}
    inside = (file for file in sorted(folder.rglob("*")) if file.is_file())
    named = {file.relative_to(folder): file for file in inside if file.resolve() not in read_files}
    return [str(name) for name in named if name.name not in _NO_DATA and not any(p.startswith(".") for p in name.parts)]


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


# ----------------------------------------------------------------------------------------------------- the Hub


def _hub_rows(path: str, split: str, config_name: str) -> Iterator[tuple[str, dict]]:
    import datasets  # takes a second, which runs without it should not cost

    name, _, folder = path.partition(":")
    try:
        table = datasets.load_dataset(name, config_name or None, data_dir=folder or None, split=split)
    except Exception as error:
        raise InputError(f"{path}: no such file here, and the Hub does not give it: {error}") from error
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(table))
