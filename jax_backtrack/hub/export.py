"""`save`: a model and its tokenizer as a Hugging Face folder."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jax_backtrack.errors import InputError
from jax_backtrack.hub import card, weights
from jax_backtrack.hub.load import check_agreement
from jax_backtrack.models import families
from jax_backtrack.models.transformer import Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.utils.workdir import sync

# What `generate` of transformers runs when it is told `custom_generate=folder`. It imports nothing of this package.
_CUSTOM_GENERATE = "custom_generate/generate.py"


def save(
    model: Transformer,
    tokenizer: ChatTokenizer,
    folder: str | Path,
    *,
    overwrite: bool = False,
    recipe: ConfigDict | Mapping | None = None,
) -> None:
    """Writes model, configuration, tokenizer and model card as a Hugging Face folder.

    recipe: what the model was trained by, for the card

    The folder appears whole or not at all; where writing fails, one that was there before stays as it was. With
    `overwrite` all that was in an earlier export goes; a folder that is none is never replaced. On several hosts all
    must call this; the first one writes.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{folder} is the folder this runs in, or one above it: name a new one")
    check_agreement(model, tokenizer, {})
    if jax.process_index() == 0:
        _replace(folder, overwrite, lambda new: _write(model, tokenizer, new, recipe))
    else:
        weights.save(model, folder)  # takes part in putting the shards together
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("saved")


def _replace(folder: Path, overwrite: bool, write: Callable[[Path], None]) -> None:
    scratch = folder.with_name(folder.name + ".writing")
    new, old = scratch / "new", scratch / "old"
    if old.exists() and not folder.exists():
        old.rename(folder)  # a save was killed between its two renames
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists already and would be overwritten; choose another folder or allow it")
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))):
        raise InputError(f"{folder} exists already and is no export, so it is not replaced; choose another folder")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        write(new)
        for path in (new, *new.rglob("*")):
            sync(path)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync(folder.parent)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        if folder.exists() or not old.exists():  # else the only copy lies there
            shutil.rmtree(scratch, ignore_errors=True)


def _write(model: Transformer, tokenizer: ChatTokenizer, folder: Path, recipe: ConfigDict | Mapping | None) -> None:
    weights.save(model, folder)
    _write_tokenizer(tokenizer, folder)
    config = families.to_hf_config(model.config) | _token_ids(tokenizer)
    config["dtype"] = str(model.embedding_VxM.dtype)
    if tokenizer.reset_id is not None:
        config["backtracking"] = _backtracking(tokenizer, model.config.vocab_size)
        (folder / _CUSTOM_GENERATE).parent.mkdir()
        shutil.copyfile(Path(__file__).parent / _CUSTOM_GENERATE, folder / _CUSTOM_GENERATE)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _token_ids(tokenizer) | {"eos_token_id": _ends(tokenizer)})
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    recipe = recipe.to_dict() if isinstance(recipe, ConfigDict) else recipe
    (folder / card.FILE).write_text(card.text(config, parameters, recipe), encoding="utf-8")


def _write_tokenizer(tokenizer: ChatTokenizer, folder: Path) -> None:
    """Writes the tokenizer's files; transformers 4, which does not know the class that 5 writes, opens them too."""
    tokenizer.hf.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for name in ("is_local", "local_files_only"):  # of the load that it came from
        config.pop(name, None)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _token_ids(tokenizer: ChatTokenizer) -> dict:
    ids = {
        "bos_token_id": tokenizer.hf.bos_token_id,
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": tokenizer.hf.pad_token_id,
    }
    # transformers does not build an embedding whose padding has no row.
    return {name: None if index in tokenizer.without_row else index for name, index in ids.items()}


def _ends(tokenizer: ChatTokenizer) -> int | list[int]:
    """Returns what ends a reply in a plain `generate`: the end of turn, and the end of a text where that is another."""
    eos_id = tokenizer.hf.eos_token_id
    same = eos_id in (None, tokenizer.eot_id) or eos_id in tokenizer.without_row
    return tokenizer.eot_id if same else [tokenizer.eot_id, eos_id]


def _backtracking(tokenizer: ChatTokenizer, rows: int) -> dict:
    """Returns what `load` and `custom_generate` read; no `reset_mode` for a model that was not trained to reset.

    unused_token_ids: runs of ids that no token has, which are never drawn: the first one and the one behind the last
    """
    stops = sorted(tokenizer.special_ids - {tokenizer.reset_id} - tokenizer.without_row.keys())
    return {
        "reset_token_id": tokenizer.reset_id,
        **({"reset_mode": tokenizer.reset_mode} if tokenizer.reset_mode else {}),
        "stop_token_ids": stops,
        "unused_token_ids": [list(run) for run in tokenizer.unused_ids(rows)],
    }


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
