"""Reads the weights of a Hugging Face folder, whether in one safetensors file or in shards with an index."""

import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_backtrack.errors import InputError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Pages of a mapped file count as the process's memory until it is closed: larger reads are cut into such pieces.
_PIECE_BYTES = 8 * 2**20
_ALIGNMENT = 64  # JAX takes an array on the host as it is, without a copy, where its address divides by this


class SafetensorsFolder:
    """A folder of `.safetensors` files. Raises InputError for what cannot be read, before any weight is read."""

    def __init__(self, folder: Path):
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        index = folder / INDEX_FILE
        indexed = index.exists()
        files = _indexed_files(index) if indexed else {SINGLE_FILE: None}
        if not indexed and not (folder / SINGLE_FILE).exists():
            found = sorted(path.name for path in folder.iterdir())
            raise InputError(
                f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}, only {', '.join(found) or 'nothing'}. "
                "Pickled weights (.bin, .pt, .pth) are never loaded: convert them to safetensors first"
            )
        for file, names in sorted(files.items()):
            self._read_header(folder / file, index.name if indexed else None)
            if names is not None and (lost := sorted(names - self._files.keys())):
                raise InputError(f"{index} says that {lost[0]} is in {file}, which has no such tensor")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in all files."""
        return self._shapes

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of one tensor in the dtype of its file; `index` holds a start and a stop per axis."""
        shape = tuple(each.stop - each.start for each in index)
        part = _aligned(shape, _DTYPES[self._dtypes[name]])
        row_bytes = math.prod(self._shapes[name][1:]) * part.itemsize
        rows = max(1, _PIECE_BYTES // max(1, row_bytes))
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            first = index[0].start
            try:
                with safe_open(self._files[name], framework="numpy") as file:
                    part[start:stop] = file.get_slice(name)[(slice(first + start, first + stop), *index[1:])]
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self._files[name]}: {name} cannot be read: {error}") from error
        return part

    def _read_header(self, path: Path, index: str | None) -> None:
        if index is not None and not os.path.isfile(path):  # where a name cannot be one, Path.is_file raises
            raise InputError(f"{path.parent / index} names the file {path.name}, which is not there")
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118, it is no dict
                    if name in self._files:
                        raise InputError(f"{name} is in {self._files[name].name} and in {path.name}")
                    tensor = file.get_slice(name)
                    if (dtype := tensor.get_dtype()) not in _DTYPES:
                        raise InputError(f"{path}: {name} is stored as {dtype}; {', '.join(_DTYPES)} are read")
                    self._files[name] = path
                    self._shapes[name] = tuple(tensor.get_shape())
                    self._dtypes[name] = dtype
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {error}") from error


def _indexed_files(index: Path) -> dict[str, set[str]]:
    """File name -> tensors that the index places there."""
    try:
        places = json.loads(index.read_text())["weight_map"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is not an index of safetensors files: {error!r}") from None
    files: dict[str, set[str]] = {}
    for name, file in places:
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index} places {name} in {file!r}, which is not a file of its folder")
        files.setdefault(file, set()).add(name)
    return files


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
