"""Reads the weights of a Hugging Face folder, whether in one safetensors file or in shards with an index."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_backtrack.errors import InputError
from jax_backtrack.utils.console import warn

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Buffers that older versions of transformers saved beside the weights. All of them are computed here, so that neither
# their dtypes nor their values matter.
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb(\..+)?|(self_attn|attn|attention)\.(bias|masked_bias|causal_mask)"
    r"|inv_freq|cos_cached|sin_cached|causal_mask|position_ids|masked_bias|embed_scale|normalizer)$"
)
# Pages of a mapped file count as the process's memory until it is closed: larger reads are cut into such pieces.
_PIECE_BYTES = 8 * 2**20
_ALIGNMENT = 64  # JAX takes an array on the host as it is, without a copy, where its address divides by this


@dataclasses.dataclass(frozen=True)
class _Tensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


class SafetensorsFile:
    """The tensors of one `.safetensors` file. Raises InputError for what cannot be read, before any of them is read."""

    def __init__(self, path: Path):
        self._tensors = _read_header(path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor; buffers are left out."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of one tensor in the dtype of its file; `index` holds a start and a stop per axis."""
        return _read(name, self._tensors[name], index)


class SafetensorsFolder(SafetensorsFile):
    """A folder of `.safetensors` files. Raises InputError for what cannot be read, before any weight is read.

    Where a single file and an index lie side by side, both must hold the same; an index that does not fit what lies
    there is said and left aside for the single file, which is what transformers reads.
    """

    def __init__(self, folder: Path):
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if index.exists() and single.exists():
            self._tensors = _read_both(single, index)
        elif index.exists():
            self._tensors = _read_shards(index, _indexed_files(index))
        elif single.exists():
            self._tensors = _read_header(single)
            if shards := sorted(path.name for path in folder.glob("model-*-of-*.safetensors")):
                warn(f"{folder}: {SINGLE_FILE} is read, and not {shards[0]}, which no index names")
        else:
            raise InputError(_nothing_to_read(folder))


def _nothing_to_read(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir())
    message = f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}, only {', '.join(files) or 'nothing'}. "
    if any(name.endswith(".safetensors") for name in files):
        return message + (
            f"Weights in one file are to have the name {SINGLE_FILE}, and those in several files need their index; "
            "save_pretrained in transformers writes both"
        )
    if any(name.endswith(".gguf") for name in files):
        return message + "To load a .gguf file, give its own path"
    return message + "Pickled weights (.bin, .pt, .pth) are never loaded: convert them to safetensors first"


def _read_both(single: Path, index: Path) -> dict[str, _Tensor]:
    """Reads the single file's tensors, where the shards of the index beside it hold the same or are no longer there."""
    files = _indexed_files(index)
    try:
        shards = _read_shards(index, files)
    except InputError as error:
        tensors, stale = _read_header(single), str(error)
    else:
        tensors = _read_header(single)
        if set(files) == {SINGLE_FILE}:
            return tensors
        if not (others := sorted(shards.keys() ^ tensors.keys())):
            _refuse_differences(tensors, shards, single, index)
            return tensors
        stale = f"{index} is of other tensors than {single.name} beside it ({others[0]})"
    warn(f"{stale}. {single} is read, as in transformers, and not the index: delete the one that is not meant")
    return tensors


def _refuse_differences(tensors: dict[str, _Tensor], shards: dict[str, _Tensor], single: Path, index: Path) -> None:
    for name, tensor in tensors.items():
        sharded = shards[name]
        if (tensor.shape, tensor.dtype) != (sharded.shape, sharded.dtype) or not _same_bytes(name, tensor, sharded):
            raise InputError(
                f"{single} and the shards of {index.name} beside it hold different weights ({name}): delete the one "
                f"that is not meant. transformers reads {single.name}"
            )


def _same_bytes(name: str, left: _Tensor, right: _Tensor) -> bool:
    bytes_of_row = math.prod(left.shape[1:]) * np.dtype(_DTYPES[left.dtype]).itemsize
    first, *rest = left.shape or (1,)
    rows = max(1, _PIECE_BYTES // max(1, bytes_of_row))
    for start in range(0, first, rows):
        index = slice(start, min(start + rows, first)), *(slice(0, size) for size in rest)
        parts = [_read(name, tensor, index[: len(tensor.shape)]) for tensor in (left, right)]
        if parts[0].tobytes() != parts[1].tobytes():
            return False
    return True


def _read_shards(index: Path, files: dict[str, set[str]]) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for file, names in sorted(files.items()):
        path = index.parent / file
        if not os.path.isfile(path):  # where a name cannot be one, Path.is_file raises
            raise InputError(f"{index} names the file {file}, which is not there")
        header = _read_header(path)
        if twice := sorted(header.keys() & tensors.keys()):
            raise InputError(f"{twice[0]} is in {tensors[twice[0]].file.name} and in {file}")
        if lost := sorted(name for name in names - header.keys() if not _BUFFER.search(name)):
            raise InputError(f"{index} says that {lost[0]} is in {file}, which has no such tensor")
        tensors |= header
    return tensors


def _read_header(path: Path) -> dict[str, _Tensor]:
    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                if _BUFFER.search(name):
                    continue
                tensor = file.get_slice(name)
                if (dtype := tensor.get_dtype()) not in _DTYPES:
                    raise InputError(
                        f"{path}: {name} is stored as {dtype}; {', '.join(_DTYPES)} are read. If the weights are "
                        "quantised, load the model that they were made from"
                    )
                tensors[name] = _Tensor(path, tuple(tensor.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def _read(name: str, tensor: _Tensor, index: tuple[slice, ...]) -> np.ndarray:
    shape = tuple(extent.stop - extent.start for extent in index)
    part = _aligned(shape, _DTYPES[tensor.dtype])
    row_bytes = math.prod(tensor.shape[1:]) * part.itemsize
    rows = max(1, _PIECE_BYTES // max(1, row_bytes))
    try:
        if not shape:
            with safe_open(tensor.file, framework="numpy") as file:
                return np.asarray(file.get_tensor(name))
        for start in range(0, shape[0], rows):
            stop = min(start + rows, shape[0])
            first = index[0].start
            with safe_open(tensor.file, framework="numpy") as file:
                part[start:stop] = file.get_slice(name)[(slice(first + start, first + stop), *index[1:])]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{tensor.file}: {name} cannot be read: {error}") from error
    return part


def _indexed_files(index: Path) -> dict[str, set[str]]:
    """Returns, by file name, the tensors that the index places there."""
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
