"""Settings of resets: what the model sees after one."""

from jax_backtrack.backtracking.trees import RESET_MODES
from jax_backtrack.utils.settings import field, section


@section("reset")
class ResetSettings:
    """Resets, in training and in sampling."""

    mode: str = field(
        "rewind",
        'What the model sees after a reset: `"keep"`, `"rewind"` or `"resample"` ([METHOD.md](METHOD.md)).',
        choices=RESET_MODES,
        decisive=True,
    )
