"""The recipes that come with the project, by name."""

import os
import runpy
import sys
from pathlib import Path

from ml_collections import ConfigDict

from jax_backtrack.errors import InputError, nearest


def _folder(package: Path) -> Path:
    """Returns where the recipes are: within the installed package, and beside it in the repository (`setup.py`)."""
    installed = package / "shipped" / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


FOLDER = _folder(Path(__file__).parent)


def known_recipes(folder: Path = FOLDER) -> dict[str, Path]:
    """Paths of the recipes by their names, as in "sft_smollm.py" or "replication/table.py"."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*.py")
        if path.stem not in ("__init__", "base")
    }


def make_importable() -> None:
    """Lets recipes begin with `from configs import`; where the package is installed, that folder is not on the path."""
    if str(FOLDER.parent) not in sys.path:
        sys.path.insert(0, str(FOLDER.parent))


def read_recipe(name: str) -> ConfigDict:
    """Returns a recipe as `--config` finds it, to change and to train by.

    name: of one that comes with the project, with or without ".py" ("sft_smollm", "replication/table.py"), or the path
          of a file of your own

    Raises InputError where there is none of this name, or where it gives no ConfigDict.
    """
    known = known_recipes()
    path = name if os.path.isfile(name) else known.get(name) or known.get(f"{name}.py")
    if path is None:
        raise InputError(f"recipe {name!r}: no such file, and no such recipe: {nearest(name, known)}")
    make_importable()
    config = runpy.run_path(str(path)).get("get_config", lambda: None)()
    if not isinstance(config, ConfigDict):
        raise InputError(f"get_config() of the recipe {name!r} gives {config!r:.60}, no ConfigDict")
    return config
