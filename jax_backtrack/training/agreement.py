"""What several hosts must agree on before they train together, and the first look at the folder that they share."""

import importlib.metadata
import json
import time
from pathlib import Path

from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from jax_backtrack.distributed import hosts
from jax_backtrack.errors import InputError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")
_SHARED_WITHIN = 60  # seconds until a file that one host wrote must be seen by the others


def agree_on_start(config: ConfigDict, finished: bool, step: int | None) -> None:
    """Compares recipe, package versions and the state of the workdir. Asks no device: those may differ too."""
    state = "a finished run" if finished else "no checkpoint" if step is None else f"step {step}"
    fields = flatten_dict(json.loads(config.to_json()), sep=".")
    facts = {f"config.{name}": repr(value) for name, value in fields.items()}
    facts |= {f"the version of {package}": importlib.metadata.version(package) for package in _PACKAGES}
    hosts.agree(facts | {"the step to resume from": state})


def agree_on_data(examples: int, content: str) -> None:
    """Compares how many examples were read and encoded, and the hash of what is in them."""
    hosts.agree({"the data": f"{examples} examples with hash {content}"})


def check_shared(file: Path) -> None:
    """Raises InputError where a file that process 0 has written is not seen here: the workdir is not shared."""
    if not hosts.several():
        return
    multihost_utils.sync_global_devices("written")
    until = time.monotonic() + _SHARED_WITHIN
    while not file.exists():
        if time.monotonic() > until:
            raise InputError(f"{file} was written by process 0 and is not here: the hosts must share the workdir")
        time.sleep(0.5)
