"""Checkpoints: the training state and the data position, saved together and restored together."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath

from jax_backtrack.training.step import TrainState

_FOLDER = "checkpoints"


def newest_step(workdir: Path) -> int | None:
    """Step of the newest checkpoint in a workdir, or None. Asks no other process; unfinished ones have other names."""
    return max((int(path.name) for path in (workdir / _FOLDER).glob("*") if path.name.isdigit()), default=None)


class Checkpoints:
    """The folder `checkpoints/` of a workdir, by Orbax: asynchronous, each one whole or not there at all.

    Of several processes each writes what its devices hold; all must call the same methods.
    """

    def __init__(self, workdir: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(epath.Path(workdir).resolve() / _FOLDER, options=options)

    def save(self, step: int, state: TrainState, data_position: dict) -> None:
        """Starts saving; training may go on."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data_position=ocp.args.JsonSave(data_position)
        )
        self._manager.save(step, args=arguments, force=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """The state at a step, sharded as `like` is, and the data position that belongs to it."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data_position=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=arguments)
        return restored.state, restored.data_position

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
