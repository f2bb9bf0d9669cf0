"""A recipe with every field at its default. Each stands in the `settings.py` of its room; docs/RECIPES.md lists all."""

from jax_backtrack.utils.settings import default_recipe


def get_config():
    """The defaults. A recipe changes some of them; `--config.section.field=value` changes one for a run."""
    return default_recipe()
