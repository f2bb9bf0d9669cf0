"""Language models that take back what they should not have begun to say."""

import jax_backtrack.backtracking.settings
import jax_backtrack.data.settings
import jax_backtrack.distributed.settings
import jax_backtrack.evaluation.settings
import jax_backtrack.hub.settings
import jax_backtrack.models.settings
import jax_backtrack.sampling.settings
import jax_backtrack.serving.settings
import jax_backtrack.training.settings  # noqa: F401, each registers its sections, whichever module is imported first
from jax_backtrack.hub.export import save
from jax_backtrack.hub.load import load
from jax_backtrack.sampling.replies import Reply, Trace
from jax_backtrack.sampling.sampler import Sampler
from jax_backtrack.sampling.settings import SamplingParams
from jax_backtrack.sampling.streams import Finished, Retraction, TextDelta, TokenText

__all__ = [
    "Finished",
    "Reply",
    "Retraction",
    "Sampler",
    "SamplingParams",
    "TextDelta",
    "TokenText",
    "Trace",
    "load",
    "save",
]
