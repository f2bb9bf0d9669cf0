"""Checks a recipe before anything is loaded: names, and numbers that are out of range. Then loads its model."""

from collections.abc import Callable

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.load import DTYPES, load
from jax_backtrack.hub.tokenizer import ChatTokenizer
from jax_backtrack.models.transformer import REMAT, Transformer
from jax_backtrack.progress import share_bar
from jax_backtrack.trees import CONTEXTS

_NAMES = {
    "objective": ("sft", "dpo"),
    "reset.context": CONTEXTS,
    "model.param_dtype": DTYPES,
    "model.compute_dtype": DTYPES,
    "train.remat": tuple(REMAT),
}
_AT_LEAST = {
    "data.limit": 0,
    "data.seed": 0,
    "reset.max_resets": 0,
    "train.batch_rows": 1,
    "train.row_length": 2,
    "train.warmup_steps": 0,
    "train.weight_decay": 0,
    "train.reset_weight": 0,
    "train.chosen_weight": 0,
    "train.score_chunk": 1,
    "train.checkpoint_every": 0,
    "train.keep_checkpoints": 1,
    "sample.max_new_tokens": 1,
    "sample.temperature": 0,
    "sample.top_k": 0,
    "sample.batch_rows": 1,
    "sample.seed": 0,
    "sample.limit": 0,
    "evaluate.prompts": 1,
}
_SHOWN = 32  # characters of a path before the bar of its loading
_ABOVE_0 = ("train.learning_rate", "train.clip_norm", "train.beta", "sample.top_p")


def check(config: ConfigDict) -> None:
    """Raises InputError naming the first field that cannot be meant, with its value and what it may be."""
    fields = flatten_dict(config.to_dict(), sep=".")
    for field, names in _NAMES.items():
        if fields[field] not in names:
            raise InputError(f"{field} is {fields[field]!r}: {nearest(str(fields[field]), names)}")
    for field, least in _AT_LEAST.items():
        if fields[field] < least:
            raise InputError(f"{field} is {fields[field]}; it must be at least {least}")
    for field in _ABOVE_0:
        if not fields[field] > 0:
            raise InputError(f"{field} is {fields[field]}; it must be above 0")


def check_training(config: ConfigDict) -> None:
    """`check`, and what only training asks for."""
    check(config)
    if config.train.steps < 1:
        raise InputError(f"train.steps is {config.train.steps}; it must be at least 1")
    if config.model.param_dtype != "float32":
        raise InputError(
            f"model.param_dtype is {config.model.param_dtype!r}: small updates would be rounded away. "
            "Parameters are trained in float32; model.compute_dtype = 'bfloat16' is what saves time"
        )
    if not (config.data.path or config.data.utility_path):
        raise InputError("neither data.path nor data.utility_path is set")


def load_model(
    config: ConfigDict, path: str, mesh: Mesh, *, remat: str = "none", load: Callable = load
) -> tuple[Transformer, ChatTokenizer]:
    """Loads `path` as the recipe says, with a bar. It may be a workdir in place of the recipe's own `model.path`."""
    its_own = path == config.model.path
    shown = path if len(path) <= _SHOWN else f"...{path[-_SHOWN:]}"
    with share_bar(f"loading {shown}") as progress:
        return load(
            path,
            mesh,
            config.model.param_dtype,
            compute_dtype=config.model.compute_dtype,
            remat=remat,
            chat_template=config.model.chat_template if its_own else "",
            revision=config.model.revision or None if its_own else None,
            progress=progress,
        )
