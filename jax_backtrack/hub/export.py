"""`save`: a model and its tokenizer as a Hugging Face folder."""

import json
import shutil
from pathlib import Path

from jax_backtrack.errors import InputError
from jax_backtrack.hub import weights
from jax_backtrack.hub.load import check_agreement
from jax_backtrack.hub.tokenizer import ChatTokenizer
from jax_backtrack.models import llama
from jax_backtrack.models.transformer import Transformer


def save(model: Transformer, tokenizer: ChatTokenizer, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes model, configuration and tokenizer as a Hugging Face folder. The folder appears whole or not at all."""
    folder = Path(folder).expanduser()
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists already and would be overwritten; choose another folder or allow it")
    check_agreement(model, tokenizer, {})
    writing = folder.with_name(folder.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    weights.save(model, writing)
    token_ids = {
        "bos_token_id": tokenizer.hf.bos_token_id,
        "eos_token_id": tokenizer.eot_id,
        "pad_token_id": tokenizer.hf.pad_token_id,
    }
    config = llama.to_hf_config(model.config) | token_ids
    config["dtype"] = str(model.embedding_VxM.dtype)
    if tokenizer.reset_context:
        config["backtracking"] = {"reset_token_id": tokenizer.reset_id, "context": tokenizer.reset_context}
    (writing / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (writing / "generation_config.json").write_text(json.dumps(token_ids, indent=2) + "\n")
    tokenizer.hf.save_pretrained(writing)
    if folder.exists():
        shutil.rmtree(folder)
    writing.rename(folder)
