"""A run's numbers on Weights & Biases, where `wandb.project` names a project."""

import importlib.util
import json
import secrets
import sys
from pathlib import Path

from jax_backtrack.errors import InputError
from jax_backtrack.utils.workdir import WANDB_RUN, atomic_write


def check_wandb() -> None:
    """Raises InputError where wandb is not installed. It is not imported yet."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder wandb/, as its runs leave one, is none either
        raise InputError("wandb.project is set, but wandb is not installed: pip install -r requirements-wandb.txt")


class WandbRun:
    """One run of a workdir, which a later process goes on with: its id stands in `wandb_run.json`.

    What the run has already is not sent again: up to the step that the server names, or offline up to the one at which
    an earlier process closed the run. wandb keeps an offline run in memory for long, so of a process that was killed
    nothing counts as sent. Raises InputError where Weights & Biases refuses the run.
    """

    def __init__(self, project: str, workdir: Path, recipe: dict):
        check_wandb()
        import wandb

        self._path = workdir / WANDB_RUN
        saved = json.loads(self._path.read_text()) if self._path.exists() else {}
        if saved.get("project") != project:
            saved = {"project": project, "id": secrets.token_hex(4), "step": 0}
        self._known = saved
        try:
            self._run = wandb.init(
                project=project,
                id=saved["id"],
                resume="allow",
                name=workdir.resolve().name,
                dir=str(workdir),
                config=recipe,
                settings=wandb.Settings(console="off"),  # progress bars are no log
            )
        except wandb.errors.Error as error:
            raise InputError(f"wandb.project = {project!r}: {error}. WANDB_MODE=offline keeps the run here") from None
        self._sent = self._run.step - 1 if self._run.resumed else saved["step"]
        self._keep()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Sends the numbers of one step, unless the run has them."""
        if step > self._sent:
            self._run.log(metrics, step=step, commit=True)  # without `commit` they wait for the next step
            self._sent = step

    def close(self) -> None:
        """Ends the run, as failed where an exception is on its way."""
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))
        self._known["step"] = self._sent
        self._keep()

    def _keep(self) -> None:
        atomic_write(self._path, json.dumps(self._known) + "\n")
