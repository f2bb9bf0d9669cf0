"""Writes the tables of docs/RECIPES.md from the settings of the package: `python tools/write_settings.py`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jax_backtrack.utils.settings import SECTIONS, table  # noqa: E402

DOCUMENT = ROOT / "docs" / "RECIPES.md"
# Heading of each table -> its sections.
TABLES = {
    "What is trained": ("", "model", "lora"),
    "Data": ("data", "data.columns"),
    "Resets": ("reset",),
    "Training": ("train", "wandb"),
    "Devices": ("mesh",),
    "Sampling": ("sample", "web"),
    "Evaluation": ("evaluate", "judge"),
}


def written(text: str) -> str:
    """Returns the document with the tables that the settings have now."""
    assert sorted(name for names in TABLES.values() for name in names) == sorted(SECTIONS)
    for heading, names in TABLES.items():
        pattern = rf"(?<=\n### {heading}\n\n)(?:\|.*\n)+"
        text, count = re.subn(pattern, lambda _, names=names: table(names), text)
        assert count == 1, f"{DOCUMENT} has no table below the heading {heading!r}"
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
