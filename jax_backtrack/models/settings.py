"""Settings of low-rank adapters."""

from jax_backtrack.models.lora import TARGETS
from jax_backtrack.utils.settings import field, section


@section("lora", decisive=True)
class LoraSettings:
    """Low-rank adapters (LoRA), which are trained beside a frozen model."""

    rank: int = field(0, "Rank of the adapters; 0 trains all parameters of the model instead.", least=0)
    alpha: float = field(32.0, "Scale of the adapters, which is alpha / rank.", above=0)
    target_modules: tuple[str, ...] = field(TARGETS, "Weights of each layer that have an adapter.")
