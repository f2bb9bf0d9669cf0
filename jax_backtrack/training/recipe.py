"""Checks a recipe before anything is loaded: names, and numbers out of range. Then reads its data, loads its model."""

import datetime
import reprlib
from collections.abc import Callable

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_backtrack.backtracking.trees import CONTEXTS
from jax_backtrack.data import sources
from jax_backtrack.data.formats import NAMES as FORMATS
from jax_backtrack.data.preferences import Preference, Report
from jax_backtrack.data.reading.files import split_paths
from jax_backtrack.distributed.mesh import check_rows
from jax_backtrack.errors import InputError, nearest
from jax_backtrack.hub.load import DTYPES, load
from jax_backtrack.models import lora
from jax_backtrack.models.attention import blockwise, tree_attention
from jax_backtrack.models.attention.pallas.tree_attention import Blocks
from jax_backtrack.models.transformer import REMAT, Compute, Transformer, TransformerConfig
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer, is_unicode
from jax_backtrack.training.step import StepPlan
from jax_backtrack.training.wandb_run import check_wandb
from jax_backtrack.utils.console import share_bar


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_MOST_NUMBER <= value <= _MOST_NUMBER


def _is_text(value) -> bool:
    return isinstance(value, str) and is_unicode(value) and "\0" not in value


# The first release known to multiply bfloat16 into float32 on a CPU; 0.8.0 does not.
BFLOAT16_ON_CPU = (0, 8, 3)
_NAMES = {
    "objective": ("sft", "dpo"),
    "reset.context": CONTEXTS,
    "model.param_dtype": DTYPES,
    "model.compute_dtype": ("auto", *DTYPES),
    "model.attention": ("auto", *tree_attention.KINDS),
    "data.format": ("", *FORMATS),
    "train.remat": tuple(REMAT),
    "train.first_moment_dtype": DTYPES,
    "train.second_moment_dtype": DTYPES,
    "sample.cache_dtype": ("", *DTYPES),
}
# Whole numbers, and others, with the least that each may be.
_WHOLE = {
    "adapter.rank": 0,
    "data.limit": 0,
    "data.seed": 0,
    "data.reply_tokens": 0,
    "data.utility_passes": 1,
    "reset.max_resets": 0,
    "mesh.data": -1,
    "mesh.fsdp": -1,
    "mesh.tensor": -1,
    "model.query_block": 1,
    "model.key_block": 1,
    "model.head_block": 1,
    "train.steps": 0,
    "train.batch_rows": 1,
    "train.row_length": 2,
    "train.accumulate": 1,
    "train.warmup_steps": 0,
    "train.score_chunk": 1,
    "train.checkpoint_every": 0,
    "train.keep_checkpoints": 1,
    "train.keep_every": 0,
    "train.max_skipped": 0,
    "sample.max_new_tokens": 1,
    "sample.top_k": 0,
    "sample.batch_rows": 1,
    "sample.seed": 0,
    "sample.samples": 1,
    "sample.hold_back": 0,
    "sample.limit": 0,
    "web.port": 0,
    "judge.layers": 1,
    "judge.tokens": 1,
    "judge.folds": 2,
    "evaluate.prompts": 1,
    "evaluate.samples": 1,
    "evaluate.limit": 0,
    "evaluate.gcg_steps": 0,
    "evaluate.gcg_width": 1,
}
_MOST_WHOLE = 2**31 - 1  # what is counted on a device is int32
_NUMBERS = {
    "data.held_out": 0,
    "reset.logit_bias": None,
    "train.weight_decay": 0,
    "train.reset_weight": 0,
    "train.direct_weight": 0,
    "train.chosen_weight": 0,
    "train.skip_above_norm": 0,
    "sample.temperature": 0,
    "sample.min_p": 0,
    "evaluate.false_resets": 0,
    "evaluate.gcg_reset_weight": 0,
}
_ABOVE_0 = (
    "adapter.alpha",
    "train.learning_rate",
    "train.clip_norm",
    "train.beta",
    "train.reset_row_rate",
    "sample.top_p",
    "sample.repetition_penalty",
)
_AT_MOST_1 = ("sample.top_p", "sample.min_p")
_MOST_NUMBER = 1e38  # float32 holds it
_TEXTS = """
    model.path model.revision model.chat_template model.template_date data.path data.utility_path data.split
    data.config_name data.columns.prompt data.columns.chosen data.columns.rejected data.columns.completion
    data.columns.messages data.columns.system data.columns.label
    train.reference_folder web.baseline wandb.project judge.data evaluate.mt_bench evaluate.judge evaluate.system_attack
    evaluate.win_rate_judge
""".split()
_FLAGS = ("data.backtrack", "sample.log_probs", "evaluate.without_resets")
# Lists, and whether something can be an entry of them.
_LISTS = {
    "adapter.weights": ("texts", _is_text),
    "data.exclude": ("texts", _is_text),
    "sample.stop_strings": ("texts", _is_text),
    "evaluate.harmful": ("texts", _is_text),
    "evaluate.harmless": ("texts", _is_text),
    "evaluate.prefill": ("whole numbers above 0", lambda entry: _is_whole(entry) and 0 < entry <= _MOST_WHOLE),
    "evaluate.reset_biases": ("finite numbers", _is_number),
}
FIELDS = frozenset({*_NAMES, *_WHOLE, *_NUMBERS, *_ABOVE_0, *_TEXTS, *_FLAGS, *_LISTS})
_SHOWN = 32  # characters of a path before the bar of its loading


def check(config: ConfigDict) -> None:
    """Raises InputError naming the first field that cannot be meant, with its value and what it may be."""
    fields = flatten_dict(config.to_dict(), sep=".")
    if unknown := sorted(fields.keys() - FIELDS):
        raise InputError(f"the recipe has {unknown[0]}, which is no field: {nearest(unknown[0], FIELDS)}")
    if missing := sorted(FIELDS - fields.keys()):
        raise InputError(f"the recipe has no {missing[0]}: begin it with base.get_config(), which has every field")
    for field in sorted(fields):
        if problem := _problem(field, fields[field]):
            raise InputError(f"{field} is {_shown(fields[field])}; it must be {problem}")
    for field, names in _NAMES.items():
        if fields[field] not in names:
            raise InputError(f"{field} is {_shown(fields[field])}: {nearest(fields[field], names)}")
    if fields["data.reply_tokens"] == 1:
        raise InputError("data.reply_tokens is 1; a reply has at least a token and its end: 0 for all, or 2 and more")
    if date := fields["model.template_date"]:
        _check_date(date)
    if fields["data.held_out"] >= 1:
        raise InputError(f"data.held_out is {fields['data.held_out']}; it is a share, below 1")
    if fields["web.port"] > 65535:
        raise InputError(f"web.port is {fields['web.port']}; it must be at most 65535")


def _check_date(date: str) -> None:
    try:
        datetime.date.fromisoformat(date)
    except ValueError:
        raise InputError(
            f"model.template_date is {_shown(date)}; it must be a date such as '2026-11-27', or ''"
        ) from None


def _problem(field: str, value) -> str | None:
    """What a field must be that it is not, or None."""
    if field in _LISTS:
        entries, is_one = _LISTS[field]
        return None if isinstance(value, (list, tuple)) and all(map(is_one, value)) else f"a list of {entries}"
    if field in _FLAGS:
        return None if isinstance(value, bool) else "True or False"
    if field in _WHOLE:
        if not _is_whole(value):
            return "a whole number"
        if value < _WHOLE[field]:
            return f"at least {_WHOLE[field]}"
        return f"at most {_MOST_WHOLE}" if value > _MOST_WHOLE else None
    if field in _TEXTS or field in _NAMES:
        return None if _is_text(value) else "a text"
    if not _is_number(value):
        return "a finite number"
    if field in _ABOVE_0 and value <= 0:
        return "above 0"
    if (least := _NUMBERS.get(field)) is not None and value < least:
        return f"at least {least}"
    return "at most 1" if field in _AT_MOST_1 and value > 1 else None


def _shown(value) -> str:
    return str(value) if isinstance(value, float) or (_is_whole(value) and abs(value) < 10**20) else reprlib.repr(value)


def check_stages(config: ConfigDict) -> None:
    """Raises InputError unless `order` names stages of the recipe, which are recipes."""
    order, stages = config.get("order"), config.get("stages")
    if not isinstance(stages, ConfigDict) or not isinstance(order, (list, tuple)) or not order:
        raise InputError("a recipe with stages has `stages`, recipes by name, and `order`, a list of their names")
    for name in order:
        if not isinstance(name, str) or not isinstance(stages.get(name), ConfigDict):
            raise InputError(f"order names the stage {_shown(name)}: {nearest(str(name), stages)}")


def check_training(config: ConfigDict) -> None:
    """`check_step`, and that there is data, and wandb where it is asked for."""
    check_step(config)
    if config.wandb.project:
        check_wandb()
    if not (config.data.path or config.data.utility_path):
        raise InputError("neither data.path nor data.utility_path is set")


def check_step(config: ConfigDict) -> None:
    """`check`, and what only a training step asks for."""
    check(config)
    if config.train.steps < 1:
        raise InputError(f"train.steps is {config.train.steps}; it must be at least 1")
    if config.model.param_dtype != "float32" and not config.adapter.rank:
        raise InputError(
            f"model.param_dtype is {config.model.param_dtype!r}: small updates would be rounded away. "
            "Parameters are trained in float32; model.compute_dtype = 'bfloat16' is what saves time. Only a model that "
            "is frozen, beside adapters (adapter.rank), may be in fewer bits"
        )
    if config.train.batch_rows % config.train.accumulate:
        raise InputError(
            f"train.batch_rows = {config.train.batch_rows} does not divide by train.accumulate = "
            f"{config.train.accumulate}"
        )
    if config.adapter.rank:
        lora.check_targets(config.adapter.weights)


def check_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Raises InputError, with the numbers, where the batch does not divide over the mesh, or a row into the blocks."""
    check_rows(config.train.batch_rows // config.train.accumulate, mesh, "train.batch_rows / train.accumulate")
    how = compute(config, mesh)
    if how.attention == "kernel":
        length, blocks = config.train.row_length, how.blocks
        if not blocks.splits(length):
            raise InputError(
                f"train.row_length = {length} does not split into blocks of model.query_block = {blocks.query} and "
                f"model.key_block = {blocks.key}, which are multiples of 128: choose such sizes, or "
                "another model.attention"
            )


def check_length(config: ConfigDict, model: TransformerConfig) -> None:
    """Raises InputError where a row is longer than the model's positions."""
    if (limit := model.max_position_embeddings) < config.train.row_length:
        raise InputError(f"train.row_length = {config.train.row_length} exceeds the model's {limit} positions")


def compute(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> Compute:
    """How the recipe's model computes on a mesh, or would on one of another `platform`: "cpu", "gpu" or "tpu"."""
    device = mesh.devices.flat[0]
    platform = platform or device.platform
    kind, dtype = config.model.attention, config.model.compute_dtype
    if kind == "auto":
        kind = tree_attention.best_kind(platform)
    tree_attention.check_kind(kind, platform)
    if dtype == "auto":
        dtype = best_dtype(platform, getattr(device, "compute_capability", ""))
    if dtype == "bfloat16" and platform == "cpu" and jax.__version_info__ < BFLOAT16_ON_CPU:
        raise InputError(
            f"model.compute_dtype = 'bfloat16' on a CPU: jax {jax.__version__} does not multiply it there; "
            f"jax {'.'.join(map(str, BFLOAT16_ON_CPU))} does"
        )
    blocks = blockwise.BLOCKS
    if kind == "kernel":
        blocks = Blocks(config.model.query_block, config.model.key_block, config.model.head_block)
    form = dict(dtype=dtype, remat=config.train.remat, mesh=mesh, attention=kind, blocks=blocks)
    return Compute.suited_to(platform, **form)


def best_dtype(platform: str, compute_capability: str = "") -> str:
    """Returns the dtype of activations for a kind of device, "cpu", "gpu" or "tpu"; a GPU has a compute capability."""
    # NVIDIA's GPUs multiply bfloat16 from compute capability 8.0 on; a T4, which Colab has, is 7.5.
    has_bfloat16 = platform != "cpu" and not compute_capability.startswith(("5.", "6.", "7."))
    return "bfloat16" if has_bfloat16 else "float32"


def step_plan(config: ConfigDict, reset_id: int | None) -> StepPlan:
    """What the recipe's training step depends on."""
    train = config.train
    return StepPlan(
        objective=config.objective,
        reset_id=reset_id if config.data.backtrack else None,
        beta=train.beta,
        chosen_weight=train.chosen_weight,
        steps=train.steps,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        clip_norm=train.clip_norm,
        score_chunk=train.score_chunk,
        accumulate=train.accumulate,
        first_moment_dtype=train.first_moment_dtype,
        second_moment_dtype=train.second_moment_dtype,
        reset_row_rate=train.reset_row_rate,
        skip_above_norm=train.skip_above_norm,
    )


def add_adapters(config: ConfigDict, model: Transformer, reset_id: int | None) -> None:
    """Gives the model the recipe's adapters, if it has any; with [RESET]'s rows where the model learns to backtrack."""
    if config.adapter.rank:
        lora.add_adapters(
            model,
            rank=config.adapter.rank,
            alpha=config.adapter.alpha,
            targets=config.adapter.weights,
            reset_id=reset_id if config.data.backtrack else None,
            seed=config.data.seed,
        )


def read_data(config: ConfigDict, *, utility: bool) -> list[tuple[str, list[Preference], Report]]:
    """Reads the recipe's safety data, or its utility data: each path with its preferences and their account."""
    data = config.data
    read = []
    for path in data_paths(config, utility=utility):
        preferences, report = sources.read(
            path,
            utility=utility,
            split=data.split,
            format=data.format or None,
            limit=data.limit or None,
            columns=data.columns.to_dict(),
            config_name=data.config_name,
        )
        read.append((path, preferences, report))
    return read


def data_paths(config: ConfigDict, *, utility: bool) -> list[str]:
    """Returns the paths of the recipe's safety data, or of its utility data."""
    path = config.data.utility_path if utility else config.data.path
    return split_paths(path) if path else []


def load_model(
    config: ConfigDict, path: str, mesh: Mesh, *, load: Callable = load
) -> tuple[Transformer, ChatTokenizer]:
    """Loads `path` as the recipe says, with a bar. It may be a workdir in place of the recipe's own `model.path`."""
    its_own = path == config.model.path
    shown = path if len(path) <= _SHOWN else f"...{path[-_SHOWN:]}"
    with share_bar(f"loading {shown}") as progress:
        model, tokenizer = load(
            path,
            mesh,
            config.model.param_dtype,
            compute=compute(config, mesh),
            chat_template=config.model.chat_template if its_own else "",
            revision=config.model.revision or None if its_own else None,
            progress=progress,
        )
    date = config.model.template_date
    tokenizer.template_date = datetime.date.fromisoformat(date) if date else None
    return model, tokenizer
