"""A recipe with every field at its default. Each stands in the `settings.py` of its room; docs/RECIPES.md lists all."""

import jax_backtrack.backtracking.settings
import jax_backtrack.data.settings
import jax_backtrack.distributed.settings
import jax_backtrack.evaluation.settings
import jax_backtrack.hub.settings
import jax_backtrack.models.settings
import jax_backtrack.sampling.settings
import jax_backtrack.serving.settings
import jax_backtrack.training.settings  # noqa: F401, each registers its sections
from jax_backtrack.utils.settings import default_recipe


def get_config():
    """The defaults. A recipe changes some of them; `--config.section.field=value` changes one for a run."""
    return default_recipe()
