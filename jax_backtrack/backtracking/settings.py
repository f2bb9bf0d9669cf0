"""Settings of resets: what the model sees after one, how many there may be, how readily they come."""

from jax_backtrack.backtracking.trees import CONTEXTS
from jax_backtrack.utils.settings import field, section


@section("reset")
class ResetSettings:
    """Resets, in training and in sampling."""

    context: str = field(
        "rewind",
        'Reset mode, what the model sees after a reset: `"keep"`, `"rewind"` or `"resample"` ([METHOD.md](METHOD.md)).',
        choices=CONTEXTS,
        decisive=True,
    )
    max_resets: int = field(
        1, "Number of resets that a reply may have; `[RESET]` is masked out after them.", unit="resets", least=0
    )
    logit_bias: float = field(
        0.0, "Bias that sampling adds to the logit of `[RESET]`; a lower one gives fewer resets.", unit="nats"
    )
