"""Where the numbers of a run go: `metrics.jsonl`, TensorBoard events, and Weights & Biases if that is wanted."""

import json
from pathlib import Path

import jax
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter

from jax_backtrack.training.wandb_run import WandbRun
from jax_backtrack.utils.json_text import to_json
from jax_backtrack.utils.workdir import METRICS, TENSORBOARD, atomic_write


class MetricsWriter:
    """Appends one line per step to `metrics.jsonl`, and the same numbers to TensorBoard. Only process 0 writes.

    They go to Weights & Biases too where the recipe's `wandb.project` names a project.

    Lines of steps from `first_step` on are removed first: a resumed run writes them again.
    """

    def __init__(self, workdir: Path, first_step: int, recipe: ConfigDict):
        self._file = self._events = self._run = None
        if jax.process_index() != 0:
            return
        path = workdir / METRICS
        lines = [line for line in path.read_text().splitlines() if _step(line) < first_step] if path.exists() else []
        atomic_write(path, "".join(line + "\n" for line in lines))
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / TENSORBOARD), purge_step=first_step)
        if recipe.wandb.project:
            self._run = WandbRun(recipe.wandb.project, workdir, recipe.to_dict())
            for line in map(json.loads, lines):
                self._run.write(line.pop("step"), line)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the numbers of one step."""
        if self._file is None:
            return
        self._file.write(to_json({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        if self._run:
            self._run.write(step, metrics)

    def close(self) -> None:
        """Closes the files, and ends the run on Weights & Biases."""
        if self._file is not None:
            self._file.close()
            self._events.close()
        if self._run:
            self._run.close()


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed process may be cut short
        return 2**63
