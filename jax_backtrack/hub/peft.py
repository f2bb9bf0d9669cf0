"""Reads an adapter folder of PEFT merged into its base, as `merge_and_unload` does, tensor by tensor.

What cannot be merged exactly is refused by the setting that asks for it.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_backtrack.errors import InputError
from jax_backtrack.hub.json_object import read_object
from jax_backtrack.hub.missing import some
from jax_backtrack.hub.safetensors_folder import SafetensorsFile
from jax_backtrack.models import families
from jax_backtrack.utils.console import warn

CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_MOST = 1e30  # of numbers that float32 is to hold
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?$"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.default)?$")

# Settings that do not change what is merged. All others must be off: null, false, empty or "none".
_HARMLESS = frozenset(
    """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora use_dora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core trainable_token_indices
    loftq_config eva_config qalora_group_size ensure_weight_tying runtime_config bias
    """.split()
)
# Ways to start that leave the base as it is. Others take what the adapter has at the start out of it.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def has_adapter(folder: Path) -> bool:
    """Returns whether a folder holds an adapter of PEFT."""
    return (folder / CONFIG_FILE).is_file()


class Adapter:
    """The adapter of a folder. Raises InputError for what cannot be merged, before any weight is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = _read_config(folder / CONFIG_FILE)
        self.base = self.config.get("base_model_name_or_path")
        self.revision = self.config.get("revision")
        self.name = f"{folder} is an adapter of {self.base or 'a base that it does not name'}"
        self._refuse_settings()

    def merged(self, base, hf_config: Mapping) -> tuple["Merged", dict]:
        """Returns the weights of `base` with the adapter in them, and the configuration that they have then."""
        file = SafetensorsFile(self._weights_file())
        merged = Merged(self, file, base)
        rows = merged.shapes().get(_EMBEDDING, (hf_config.get("vocab_size"),))[0]
        config = {**hf_config, "vocab_size": rows}
        if merged.unties(hf_config):
            config["tie_word_embeddings"] = False
        return merged, config

    def refuse(self, why: str) -> InputError:
        return InputError(
            f"{self.name}: {why}. Merge it in PEFT, merge_and_unload() and save_pretrained, and load the result"
        )

    def scaling(self, module: str, rank: int) -> float:
        """Returns the factor of the product of the two matrices."""
        patterns = (self.config.get("alpha_pattern") or {}, self.config.get("rank_pattern") or {})
        alpha, configured = (
            pattern.get(_pattern(pattern, module), self.config.get(default))
            for pattern, default in zip(patterns, ("lora_alpha", "r"), strict=True)
        )
        for field, value in (("lora_alpha", alpha), ("r", configured)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < _MOST:
                shown = reprlib.repr(value)
                raise InputError(f"{self.folder / CONFIG_FILE}: {field} = {shown} of {module} is no number")
        if configured != rank:
            raise InputError(f"{self.folder}: {module} has rank {rank}, {CONFIG_FILE} says {configured}")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def token_indices(self, module: str) -> list[int]:
        """Tokens whose rows the adapter has in place of the base's."""
        indices = self.config.get("trainable_token_indices")
        if isinstance(indices, dict):
            indices = indices.get(_pattern(indices, module))
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise InputError(f"{self.folder / CONFIG_FILE}: trainable_token_indices names no tokens for {module}")
        return indices

    def _refuse_settings(self) -> None:
        kind = self.config.get("peft_type")
        if kind is None:
            raise InputError(f"{self.folder / CONFIG_FILE} has no peft_type: only adapters of PEFT are read")
        if kind != "LORA":
            raise self.refuse(f"peft_type = {reprlib.repr(kind)} is not supported; only 'LORA' is")
        for field, value in self.config.items():
            if field not in _HARMLESS and value not in (None, False, "none") and value != [] and value != {}:
                raise self.refuse(f"{field} = {reprlib.repr(value)} is not supported")
        start = self.config.get("init_lora_weights", True)
        if start not in _STARTS:
            raise self.refuse(
                f"init_lora_weights = {reprlib.repr(start)} is not supported: it changes the base as well"
            )

    def _weights_file(self) -> Path:
        file = self.folder / _WEIGHTS_FILE
        if not file.is_file():
            files = sorted(path.name for path in self.folder.glob("adapter_model*"))
            pickled = f" ({', '.join(files)} is pickled, and never loaded)" if files else ""
            raise InputError(
                f"{self.name}, but holds no {_WEIGHTS_FILE}{pickled}: save it again with safetensors, which PEFT does "
                "unless safe_serialization=False"
            )
        return file


class Merged:
    """A source of weights: those of a base, with an adapter in them."""

    def __init__(self, adapter: Adapter, file: SafetensorsFile, base):
        self._adapter, self._file, self._base = adapter, file, base
        self._low_rank: dict[str, dict[str, str]] = {}  # weight -> part -> tensor of the adapter's file
        self._whole: dict[str, str] = {}  # weight -> the tensor that stands in its place
        self._rows: dict[str, str] = {}  # weight -> the tensor of rows that stand in the place of some
        for name in file.shapes():
            self._sort(name)
        self._shapes = dict(base.shapes())
        self._shapes |= {weight: file.shapes()[name] for weight, name in self._whole.items()}
        self._check()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor."""
        return self._shapes

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Returns a part of one tensor: in the dtype of its file, or in float32 where the adapter has a say."""
        if name in self._low_rank:
            return self._with_low_rank(name, index)
        part = self._read_base(name, index)
        return self._with_rows(name, part, index) if name in self._rows else part

    def unties(self, hf_config: Mapping) -> bool:
        """Returns whether the adapter brings a head or an embedding of its own to a model with one tensor for both."""
        if hf_config.get("tie_word_embeddings", hf_config.get("model_type") == "gemma2") is not True:
            return False
        brought = {_HEAD, _EMBEDDING} & self._whole.keys()
        if {_HEAD, _EMBEDDING} & self._low_rank.keys():
            raise self._adapter.refuse("it changes the embedding or the head, which are one tensor in its base")
        if not brought or (brought == {_EMBEDDING} and not self._saved(_EMBEDDING)):
            return False  # an embedding that was only resized is still the head too
        if len(brought) == 2 and np.array_equal(*(self._all(self._whole[name]) for name in sorted(brought))):
            del self._whole[_HEAD], self._shapes[_HEAD]
            return False
        if brought == {_EMBEDDING}:
            self._shapes[_HEAD] = dict(self._base.shapes())[_EMBEDDING]
        return True

    def _saved(self, weight: str) -> bool:
        modules = self._adapter.config.get("modules_to_save") or []
        return any(weight.removesuffix(".weight").split(".")[-1] == str(module).split(".")[-1] for module in modules)

    def _read_base(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name in self._whole:
            return self._file.read(self._whole[name], index)
        if name == _HEAD and _HEAD not in self._base.shapes():
            name = _EMBEDDING
        return self._base.read(name, index)

    def _with_low_rank(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        parts = self._low_rank[name]
        if "lora_magnitude_vector" in parts:
            columns = slice(0, self._shapes[name][1])  # the norms of whole rows are needed
        base = self._read_base(name, (rows, columns)).astype(np.float32)
        module = name.removesuffix(".weight")
        if "lora_A" in parts:
            down, up = self._all(parts["lora_A"]), self._all(parts["lora_B"])
            merged = base + self._adapter.scaling(module, len(down)) * (up[rows] @ down[:, columns])
        else:
            down, up = self._all(parts["lora_embedding_A"]), self._all(parts["lora_embedding_B"])
            merged = base + self._adapter.scaling(module, len(down)) * (up[columns] @ down[:, rows]).T
        if "lora_magnitude_vector" in parts:
            magnitude = self._all(parts["lora_magnitude_vector"]).reshape(-1)[rows]
            merged *= (magnitude / np.linalg.norm(merged, axis=1))[:, None]
            merged = merged[:, index[1]]
        return merged.astype(np.float32)

    def _with_rows(self, name: str, part: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        part = part.astype(np.float32)
        new = self._all(self._rows[name])
        for token, row in zip(self._adapter.token_indices(name.removesuffix(".weight")), new, strict=True):
            if index[0].start <= token < index[0].stop:
                part[token - index[0].start] = row[index[1]]
        return part

    def _all(self, name: str) -> np.ndarray:
        whole = tuple(slice(0, size) for size in self._file.shapes()[name])
        return self._file.read(name, whole).astype(np.float32)

    def _sort(self, name: str) -> None:
        bare = name.removeprefix("base_model.model.")
        if ".original_module." in bare:  # what a module of `modules_to_save` was before
            return
        for wrapper in ("modules_to_save.default.", "modules_to_save.", "token_adapter.base_layer.", "base_layer."):
            bare = bare.replace(wrapper, "")
        if match := _PART.fullmatch(bare):
            self._low_rank.setdefault(f"{match['module']}.weight", {})[match["part"]] = name
        elif match := _TOKENS.fullmatch(bare):
            self._rows[f"{match['module']}.weight"] = name
        else:
            self._whole[bare] = name

    def _check(self) -> None:
        """Raises InputError for tensors that do not fit the base."""
        base, file = self._base.shapes(), self._file.shapes()
        base_names = set(base) | {_HEAD}
        if lost := sorted((self._low_rank.keys() | self._whole.keys() | self._rows.keys()) - base_names):
            raise InputError(
                f"{self._adapter.name}, but adapts what its base does not have: {some(lost)}. Its base is another model"
            )
        for weight, name in self._whole.items():
            of_vocabulary = weight in (_HEAD, _EMBEDDING)  # they may have been resized
            if file[name][of_vocabulary:] != base.get(weight, base[_EMBEDDING])[of_vocabulary:]:
                raise InputError(f"{self._adapter.name}: {name} has shape {file[name]}, the base's {base.get(weight)}")
        for weight, name in self._rows.items():
            tokens, shape = self._adapter.token_indices(weight.removesuffix(".weight")), self._shapes[weight]
            if file[name] != (len(tokens), *shape[1:]) or max(tokens, default=0) >= shape[0]:
                raise InputError(f"{self._adapter.name}: {name} does not fit trainable_token_indices and {weight}")
        for weight, parts in self._low_rank.items():
            self._check_low_rank(weight, {part: file[name] for part, name in parts.items()})

    def _check_low_rank(self, weight: str, parts: dict[str, tuple[int, ...]]) -> None:
        shape = self._shapes.get(weight)
        magnitude = parts.pop("lora_magnitude_vector", None)
        pairs = (["lora_A", "lora_B"], ["lora_embedding_A", "lora_embedding_B"])
        if shape is None or len(shape) != 2 or sorted(parts) not in pairs:
            raise InputError(f"{self._adapter.name}: {weight} has {', '.join(sorted(parts))}, and not both matrices")
        down, up = (parts[name] for name in sorted(parts))
        outputs, inputs = shape if "lora_A" in parts else shape[::-1]
        if len(down) != 2 or len(up) != 2 or (up[0], down[1]) != (outputs, inputs) or up[1] != down[0]:
            raise InputError(
                f"{self._adapter.name}, but its matrices {down} and {up} do not fit {weight} of shape {shape}. Its "
                "base is another model"
            )
        if magnitude is not None and ("lora_A" not in parts or math.prod(magnitude) != shape[0]):
            raise self._adapter.refuse(f"use_dora = True is not supported for {weight}")
        if self._adapter.config.get("use_dora") and magnitude is None:
            raise InputError(f"{self._adapter.name}: {weight} has no lora_magnitude_vector, which use_dora needs")
        self._adapter.scaling(weight.removesuffix(".weight"), down[0])


def open_merged(adapter: Adapter, open_base: Callable[[str], tuple], folder: Path) -> tuple:
    """Returns what `open_base` gives for the adapter's base: a function that opens weights, the configuration, and one
    that     opens the tokenizer; with the adapter merged in."""
    try:
        open_source, config, open_tokenizer = open_base(_base_path(adapter, folder))
        families.from_hf_config(config)  # of quantised weights it says more than their file does
        source = open_source()
    except InputError as error:
        raise _no_base(adapter, error) from None
    merged, config = adapter.merged(source, config)
    warn(f"{adapter.name}, and is merged into it")
    return lambda: merged, config, open_tokenizer


def _base_path(adapter: Adapter, folder: Path) -> str:
    """Returns the base as it can be opened: a path from here, or from the adapter's folder, or a Hub id."""
    if not adapter.base:
        raise InputError("base_model_name_or_path is not set")
    if adapter.base in (".", "./"):
        return str(folder)
    from_here, beside = Path(adapter.base).expanduser(), folder / adapter.base
    paths = {path.resolve(): path for path in (from_here, beside) if path.exists()}
    if len(paths) > 1:
        raise InputError(f"both {from_here.resolve()} and {beside.resolve()} are there; make it one whole path")
    return str(next(iter(paths.values()), adapter.base))


def _no_base(adapter: Adapter, error: InputError) -> InputError:
    return InputError(
        f"{adapter.name}, which cannot be read: {error}. Set base_model_name_or_path in "
        f"{adapter.folder / CONFIG_FILE} to a folder with the base in 16 or 32 bits, or merge the adapter in PEFT, "
        "merge_and_unload() and save_pretrained, and load the result"
    )


def _read_config(file: Path) -> dict[str, Any]:
    config = read_object(file)
    for field, kind in (("base_model_name_or_path", str), ("revision", str), ("peft_type", str)):
        if config.get(field) is not None and not isinstance(config[field], kind):
            raise InputError(f"{file}: {field} = {reprlib.repr(config[field])} is no text")
    if not isinstance(config.get("modules_to_save") or [], list):
        raise InputError(f"{file}: modules_to_save = {reprlib.repr(config['modules_to_save'])} is no list")
    for field in ("alpha_pattern", "rank_pattern"):
        if config.get(field) is not None and not isinstance(config[field], dict):
            raise InputError(f"{file}: {field} = {reprlib.repr(config[field])} is no object")
    return config


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """Returns the pattern that a module's name ends in, or the name; as PEFT finds it."""
    try:
        return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
    except re.error as error:
        raise InputError(f"{CONFIG_FILE}: a pattern of a module's name is none: {error}") from None
