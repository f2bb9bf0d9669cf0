"""`load`: a model and its tokenizer, from where people keep them."""

import dataclasses
import importlib.util
import json
import reprlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import transformers
from flax import nnx
from jax.sharding import Mesh

from jax_backtrack.backtracking.trees import RESET_MODES
from jax_backtrack.distributed.mesh import make_mesh, param_shardings
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub import peft, weights
from jax_backtrack.hub.download import download, download_file
from jax_backtrack.hub.gguf import GGUFFile
from jax_backtrack.hub.json_object import read_object
from jax_backtrack.hub.missing import some
from jax_backtrack.hub.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder
from jax_backtrack.models import families
from jax_backtrack.models.families.published import PUBLISHED
from jax_backtrack.models.transformer import Compute, Transformer, TransformerConfig
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.utils.console import warn
from jax_backtrack.utils.workdir import EXPORT, RECIPE

DTYPES = ("float32", "bfloat16")


def load(
    path: str | Path,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    *,
    compute: Compute | None = None,
    chat_template: str = "",
    revision: str | None = None,
    token: str | None = None,
    tokenizer: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Transformer, ChatTokenizer | None]:
    """Loads a model and its tokenizer.

    path:          a Hugging Face folder, a workdir of ours (its `export/`), a `.gguf` file, a folder with an adapter of
                   PEFT, which is merged into its base, or a Hub id
    mesh:          devices to shard parameters and rows over; all devices by `data` if None
    dtype:         of the parameters, whatever the file holds: "float32" or "bfloat16"
    compute:       how the model computes, its mesh aside; by default in `dtype`, with dense attention
    chat_template: "chatml", "gemma2", "llama3" or the path of a .jinja file, in place of the tokenizer's own
    revision:      of a Hub id: branch, tag or commit
    token:         for a Hub id that is not public; by default that of `hf auth login` or of HF_TOKEN
    tokenizer:     False for the model alone: no file of the tokenizer is read, and None stands in its place
    progress:      called with the number of parameters read since its last call, and of all

    Raises InputError for what cannot be loaded as it stands: see `weights.fill`, `families.from_hf_config`.
    """
    dtype = _dtype_name(dtype)
    open_source, hf_config, open_tokenizer = _open(str(path), revision, token)
    config = families.from_hf_config(hf_config)
    source, backtracking = open_source(), _backtracking(hf_config)
    chat = ChatTokenizer(open_tokenizer(), backtracking.get("reset_mode"), chat_template) if tokenizer else None
    mesh = mesh or make_mesh()
    compute = dataclasses.replace(compute or Compute(dtype), mesh=mesh)
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), param_dtype=jnp.dtype(dtype), compute=compute))
    if chat is not None:
        _note_rows(chat, config.vocab_size)
        check_agreement(model, chat, hf_config)
        # An export says of itself that it was not trained to reset; other files with [RESET] leave it open.
        chat.asks_reset_mode = (
            chat.reset_id is not None and "reset_token_id" not in backtracking and "reset_mode" not in backtracking
        )
        if chat.asks_reset_mode:
            warn(f"{path} has [RESET], but does not say which reset mode it was trained with")
    total = sum(param.size for param in jax.tree.leaves(nnx.state(model, nnx.Param)))
    weights.fill(model, source, param_shardings(model, mesh), lambda done: progress(done, total))
    return model, chat


def load_tokenizer(
    path: str, *, chat_template: str = "", revision: str | None = None, token: str | None = None
) -> ChatTokenizer:
    """Loads the tokenizer of a model as `load` does, and reads none of its weights."""
    _, hf_config, open_tokenizer = _open(path, revision, token, weights=False)
    tokenizer = ChatTokenizer(open_tokenizer(), _backtracking(hf_config).get("reset_mode"), chat_template)
    if isinstance(rows := hf_config.get("vocab_size"), int):
        _note_rows(tokenizer, rows)
    return tokenizer


def read_config(path: str, revision: str | None = None, token: str | None = None) -> TransformerConfig:
    """Returns a model's configuration without its weights: a local one's, a published one's, or the Hub's."""
    if path in PUBLISHED and not Path(path).exists():
        return families.from_hf_config(PUBLISHED[path])
    local = Path(path).expanduser()
    if not local.exists():
        return families.from_hf_config(json.loads(download_file(path, "config.json", revision, token).read_text()))
    return families.from_hf_config(_open(path, revision, token)[1])


def packaged_gguf(package: str) -> str | None:
    """Returns the path of the `.gguf` file that an installed package carries, or None. The package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return str(files[0]) if files else None


def check_agreement(model: Transformer, tokenizer: ChatTokenizer, hf_config: dict) -> None:
    """Raises InputError where tokenizer, embedding and configuration do not agree on the vocabulary or on [RESET]."""
    rows = model.embedding_VxM.shape[0]
    if rows != model.config.vocab_size:
        raise InputError(f"the embedding has {rows} rows, the configuration says vocab_size {model.config.vocab_size}")
    if tokenizer.largest_id >= rows and tokenizer.largest_id not in tokenizer.without_row:
        raise InputError(f"the tokenizer gives ids up to {tokenizer.largest_id}, the embedding has {rows} rows")
    recorded = _backtracking(hf_config).get("reset_token_id", tokenizer.reset_id)
    if recorded != tokenizer.reset_id:
        raise InputError(f"config.json says [RESET] is id {recorded}, the tokenizer says {tokenizer.reset_id}")


def _note_rows(tokenizer: ChatTokenizer, rows: int) -> None:
    """Lets a tokenizer have some tokens more than the embedding has rows, as some on the Hub do, and says which.

    One that has more than twice as many is another model's. What every reply needs must have a row.
    """
    if tokenizer.largest_id < rows or len(tokenizer.hf) > 2 * rows:
        return
    tokenizer.note_rows(rows)
    names = [repr(token) for _, token in sorted(tokenizer.without_row.items())]
    for index, what in ((tokenizer.eot_id, "ends the assistant's turn"), (tokenizer.reset_id, "takes a draft back")):
        if index in tokenizer.without_row:
            raise InputError(
                f"the token {tokenizer.without_row[index]!r}, which {what}, has id {index}; the embedding has {rows} "
                "rows"
            )
    warn(
        f"{len(names)} tokens of the tokenizer have no row in the embedding of {rows} rows: {some(names)}. Texts that "
        "need one are refused"
    )


def _dtype_name(dtype) -> str:
    """Returns one of `DTYPES`, of a dtype or of its name."""
    name = dtype if isinstance(dtype, str) else getattr(dtype, "name", getattr(dtype, "__name__", str(dtype)))
    if name not in DTYPES:
        raise InputError(f"dtype {dtype!r}: {nearest(name, DTYPES)}")
    return name


def _backtracking(hf_config: dict) -> dict:
    """Returns what an export's configuration says of [RESET]; nothing in other models."""
    backtracking = hf_config.get("backtracking", {})
    if not isinstance(backtracking, dict):
        raise InputError(f"config.json: backtracking = {reprlib.repr(backtracking)} is not an object")
    if backtracking.get("reset_mode") not in (None, *RESET_MODES):
        shown = reprlib.repr(backtracking["reset_mode"])
        raise InputError(f"config.json: backtracking.reset_mode = {shown} is none of {', '.join(RESET_MODES)}")
    return backtracking


def _open(path: str, revision: str | None, token: str | None, adapted: tuple[Path, ...] = (), *, weights: bool = True):
    """Returns of whatever `path` names a function that opens its weights, its configuration, and one that opens its
    tokenizer.

    adapted: folders of adapters whose base this is
    """
    try:
        local = Path(path).expanduser()
        is_local = local.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path:.200}: no path that can be looked at: {error}") from None
    if revision is not None and is_local:
        raise InputError(f"{path} is here, so the revision {revision!r} has no meaning: it goes with a Hub id")
    if local.suffix == ".gguf":
        if not local.is_file():
            raise InputError(f"{path}: no such file")
        file = GGUFFile(local)
        return lambda: file, file.hf_config(), file.tokenizer
    if not is_local:
        local = download(path, revision, token, weights=weights)
    elif (local / EXPORT / "config.json").is_file():
        _refuse_two_models(local)
        local = local / EXPORT
    if peft.has_adapter(local):
        return _open_adapted(local, token, adapted)
    return _open_folder(local, path)


def _open_folder(folder: Path, path: str):
    if not (folder / "config.json").is_file():
        if (folder / RECIPE).is_file():
            raise InputError(f"{path} has no {EXPORT}/: a workdir whose training is not finished?")
        files = sorted(file.name for file in folder.glob("*.gguf")) if folder.is_dir() else []
        inside = f"; it holds {files[0]}: give that file's own path" if files else ""
        raise InputError(
            f"{path} is neither a Hugging Face folder (no config.json) nor a workdir with {EXPORT}/{inside}"
        )
    config = read_object(folder / "config.json")
    if "model_type" not in config:
        raise InputError(f"{folder / 'config.json'} has no model_type: it is not that of a Hugging Face model")
    return lambda: SafetensorsFolder(folder), config, lambda: _open_tokenizer(folder)


def _refuse_two_models(folder: Path) -> None:
    """Raises InputError for a workdir that is a Hugging Face folder as well: either may be meant."""
    if (folder / "config.json").is_file():
        raise InputError(
            f"{folder} holds a model and another one in {EXPORT}/: give {folder / EXPORT}, or take {EXPORT}/ away"
        )


def _open_adapted(folder: Path, token: str | None, adapted: tuple[Path, ...]):
    """Returns an adapter's base with the adapter merged in; the tokenizer is the adapter's, where it has one."""
    if folder.resolve() in adapted:
        raise InputError(f"{folder} is an adapter of itself, by way of its base")
    has_model = any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
    if has_model and not any(folder.glob("adapter_model*")):
        warn(f"{folder / peft.CONFIG_FILE} is left aside: the weights beside it are those of a whole model")
        return _open_folder(folder, str(folder))
    adapter = peft.Adapter(folder)

    def open_base(path: str):
        if has_model and Path(path).resolve() == folder.resolve():
            return _open_folder(folder, path)
        return _open(path, adapter.revision if not Path(path).exists() else None, token, (*adapted, folder.resolve()))

    if has_model and not adapter.base:
        adapter.base = str(folder)
    try:
        open_source, config, open_tokenizer = peft.open_merged(adapter, open_base, folder)
    except InputError as error:
        if not has_model or adapter.base == str(folder):
            raise
        raise InputError(
            f"{error}. A whole model lies beside the adapter: where it is the base, set base_model_name_or_path to "
            f"'.'; where the adapter is merged into it already, take {peft.CONFIG_FILE} away"
        ) from None
    if has_model and Path(adapter.base).resolve() != folder.resolve() and adapter.base != ".":
        warn(f"{folder} holds a whole model too, which is not read: the adapter is merged into its base {adapter.base}")
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return open_source, config, (lambda: _open_tokenizer(folder)) if has_tokenizer else open_tokenizer


def _open_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer as its `tokenizer.json` has it.

    AutoTokenizer would build it anew by the class that a configuration names (Gemma's makes "<mask>" special), and it
    imports torch where that is installed, which takes two seconds.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json; save_pretrained of its tokenizer in transformers writes one")
    try:
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    except BaseException as error:
        # A panic of tokenizers is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
