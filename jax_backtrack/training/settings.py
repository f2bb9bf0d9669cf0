"""Settings of training, and what a training asks of its recipe before anything is loaded."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_backtrack.distributed.mesh import check_rows
from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import DTYPES
from jax_backtrack.hub.settings import compute
from jax_backtrack.models import lora
from jax_backtrack.models.transformer import REMAT, Transformer, TransformerConfig
from jax_backtrack.training.step import TrainConfig
from jax_backtrack.training.wandb_run import check_wandb
from jax_backtrack.utils.settings import check, field, section


@section("", decisive=True)
class RunSettings:
    """Kind of training."""

    objective: str = field("sft", '`"sft"` or `"dpo"`.', choices=("sft", "dpo"))


@section("train", decisive=True)
class TrainSettings:
    """Training: sizes, optimizer, losses, checkpoints."""

    steps: int = field(100, "Number of optimizer steps.", unit="updates", least=0)
    batch_size: int = field(8, "Rows of an update, over all hosts.", unit="rows", least=1)
    max_seq_len: int = field(1024, "Length of a row; the tree of an example must fit into one.", unit="tokens", least=2)
    grad_accumulation_steps: int = field(
        1, "Parts that a batch is taken in, one after the other, for less memory.", unit="parts", least=1
    )
    mu_dtype: str = field("float32", 'Dtype of AdamW\'s mean of gradients; or `"bfloat16"`.', choices=DTYPES)
    nu_dtype: str = field("float32", 'Dtype of AdamW\'s mean of squared gradients; or `"bfloat16"`.', choices=DTYPES)
    learning_rate: float = field(1e-5, "Peak learning rate, which the warm-up ends at.", above=0)
    warmup_steps: int = field(5, "Number of steps of the warm-up.", unit="updates", least=0)
    weight_decay: float = field(0.0, "AdamW's weight decay, on matrices.", least=0)
    max_grad_norm: float = field(1.0, "Maximum global norm of a gradient, which is clipped to it.", above=0)
    skip_above_norm: float = field(
        0.0,
        "Norm of the gradient, before clipping, above which a batch is skipped; 0 for any finite norm. A loss or "
        "gradient that is not finite always skips it.",
        least=0,
    )
    max_skipped: int = field(
        3, "Batches that may be skipped in a run; one more ends it.", unit="batches", least=0, decisive=False
    )
    beta: float = field(0.1, "DPO's beta; larger holds the model closer to its reference.", unit="1/nats", above=0)
    rpo_alpha: float = field(
        0.0,
        "Weight of the chosen sides' mean negative score, added to DPO's loss: it keeps them likely while the rejected "
        "ones fall (Pang et al. 2024, arXiv 2404.19733). 0 is the standard loss.",
        least=0,
    )
    reset_weight: float = field(
        1.0, "SFT weight of a `[RESET]`, where a token of a reply has 1.", unit="tokens", least=0
    )
    initial_reply_weight: float = field(
        1.0,
        "SFT weight of each token of a safe reply right after the prompt, where an unsafe one is to be taken back. At "
        "0 the model learns to decline after a reset only, and answers more ([RESULTS.md](RESULTS.md)).",
        unit="tokens",
        least=0,
    )
    reset_embedding_lr_scale: float = field(
        1.0, "Share of the learning rate that the rows of `[RESET]` in embedding and head have.", above=0
    )
    reference_folder: str = field(
        "",
        'Folder of what the reference gives, for several runs to share; `""`: the workdir.',
        decisive=False,
    )
    logits_chunk_size: int = field(128, "Scored tokens per row whose logits exist at once.", unit="tokens", least=1)
    remat: str = field(
        "none",
        'What the backward pass computes again, from most to least memory: `"none"`, `"dots"` (all but products with '
        'weights), `"attention"` (all but what the attention kernel made) or `"full"` (up to a third more work).',
        choices=tuple(REMAT),
        decisive=False,
    )
    checkpoint_every_steps: int = field(
        100,
        "Updates from one checkpoint to the next; 0 for none, only the export at the end.",
        unit="updates",
        least=0,
        decisive=False,
    )
    max_to_keep: int = field(
        2,
        "Newest checkpoints that are kept; where the newest is damaged, the one before it is taken.",
        unit="checkpoints",
        least=1,
        decisive=False,
    )
    keep_period: int = field(
        0,
        "Number of updates of whose multiples checkpoints are kept for good; 0 for none.",
        unit="updates",
        least=0,
        decisive=False,
    )


@section("wandb")
class WandbSettings:
    """Weights & Biases."""

    project: str = field("", 'Project of Weights & Biases that metrics are sent to as well; `""`: none.')


def check_training(config: ConfigDict) -> None:
    """Raises InputError where `check_step` does, where there is no data, or no wandb that is asked for."""
    check_step(config)
    if config.wandb.project:
        check_wandb()
    if not (config.data.path or config.data.utility_path):
        raise InputError("neither data.path nor data.utility_path is set")


def check_step(config: ConfigDict) -> None:
    """Raises InputError where `settings.check` does, or where no training step can be made of the recipe."""
    check(config)
    if config.train.steps < 1:
        raise InputError(f"train.steps is {config.train.steps}; it must be at least 1")
    if config.model.param_dtype != "float32" and not config.lora.rank:
        raise InputError(
            f"model.param_dtype is {config.model.param_dtype!r}: small updates would be rounded away. "
            "Parameters are trained in float32; model.compute_dtype = 'bfloat16' is what saves time. Only a model that "
            "is frozen, beside adapters (lora.rank), may be in fewer bits"
        )
    if config.train.batch_size % config.train.grad_accumulation_steps:
        raise InputError(
            f"train.batch_size = {config.train.batch_size} does not divide by train.grad_accumulation_steps = "
            f"{config.train.grad_accumulation_steps}"
        )
    if config.lora.rank:
        lora.check_targets(config.lora.target_modules)


def check_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Raises InputError, with the numbers, where the batch does not divide over the mesh, or a row into the blocks."""
    check_rows(
        config.train.batch_size // config.train.grad_accumulation_steps,
        mesh,
        "train.batch_size / train.grad_accumulation_steps",
    )
    how = compute(config, mesh)
    if how.attention == "pallas":
        length, blocks = config.train.max_seq_len, how.blocks
        if not blocks.splits(length):
            raise InputError(
                f"train.max_seq_len = {length} does not split into blocks of model.query_block = {blocks.query} and "
                f"model.key_block = {blocks.key}, which are multiples of 128: choose such sizes, or "
                "another model.attention"
            )


def check_length(config: ConfigDict, model: TransformerConfig) -> None:
    """Raises InputError where a row is longer than the model's positions."""
    if (limit := model.max_position_embeddings) < config.train.max_seq_len:
        raise InputError(f"train.max_seq_len = {config.train.max_seq_len} exceeds the model's {limit} positions")


def train_config(config: ConfigDict, reset_id: int | None) -> TrainConfig:
    """Returns what the recipe's training step depends on."""
    train = config.train
    return TrainConfig(
        objective=config.objective,
        reset_id=reset_id if config.data.backtrack else None,
        beta=train.beta,
        rpo_alpha=train.rpo_alpha,
        steps=train.steps,
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        logits_chunk_size=train.logits_chunk_size,
        grad_accumulation_steps=train.grad_accumulation_steps,
        mu_dtype=train.mu_dtype,
        nu_dtype=train.nu_dtype,
        reset_embedding_lr_scale=train.reset_embedding_lr_scale,
        skip_above_norm=train.skip_above_norm,
    )


def add_adapters(config: ConfigDict, model: Transformer, reset_id: int | None) -> None:
    """Gives the model the recipe's adapters, if it has any; with [RESET]'s rows where the model learns to backtrack."""
    if config.lora.rank:
        lora.add_adapters(
            model,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            targets=config.lora.target_modules,
            reset_id=reset_id if config.data.backtrack else None,
            seed=config.data.seed,
        )
