"""Checkpoints: training state, data position and recipe, saved together and restored together."""

import contextlib
import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint.checkpoint_managers import preservation_policy as preserve

from jax_backtrack.distributed import hosts
from jax_backtrack.distributed.preemption import RESTART
from jax_backtrack.errors import InputError
from jax_backtrack.training.step import TrainState
from jax_backtrack.utils.console import console
from jax_backtrack.utils.fingerprint import fingerprint
from jax_backtrack.utils.workdir import CHECKPOINTS

_SAID = 120  # characters of the beginning and of the end of a long message
_ASIDE = "damaged"  # ending of the name of a checkpoint that was set aside
# What TensorStore and XLA begin a message with: the name of a status of Abseil. Those of contents that are wrong.
_STATUS = re.compile("[A-Z]+(_[A-Z]+)*(?=: )")
_DAMAGED = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE")


class DamagedCheckpoint(Exception):
    """One of several hosts has set the newest checkpoint aside. With `code` as its exit code a run is started again."""

    code = RESTART


@dataclasses.dataclass(frozen=True)
class Restored:
    """state: of the training behind `step`; data_position: of what comes next; data: its hash; recipe: its fields."""

    step: int
    state: TrainState
    data_position: dict
    data: str
    recipe: dict


def newest_step(workdir: Path) -> int | None:
    """Returns the step of the newest checkpoint in a workdir, or None. Asks no other process; unfinished ones have
    other names."""
    return max(_steps(workdir / CHECKPOINTS), default=None)


class Checkpoints:
    """The folder `checkpoints/` of a workdir, by Orbax: asynchronous, each one whole or not there at all.

    data: a hash of all data, that each checkpoint keeps. Of several processes each writes what its devices hold; all
    must call the same methods. OSError where one cannot be written; those before it stay as they are.
    """

    def __init__(self, workdir: Path, config: ConfigDict, data: str):
        self._folder = workdir.resolve() / CHECKPOINTS
        self._facts = {"recipe": json.loads(config.to_json()), "data": data}
        policies = [preserve.LatestN(config.train.max_to_keep)]
        if config.train.keep_period:
            policies.append(preserve.EveryNSteps(config.train.keep_period))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve.AnyPreservationPolicy(policies), create=True, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: TrainState, data_position: dict) -> None:
        """Starts saving; training may go on. Raises what the save before this one met."""
        facts = self._facts | {"data_position": data_position, "fingerprint": fingerprint(state)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), facts=ocp.args.JsonSave(facts))
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            raise self._unwritten(error) from error

    def restore(self, like: TrainState) -> Restored | None:
        """Returns the newest checkpoint that is whole, sharded as `like` is, whatever devices wrote it; None if there
        is none.

        Damaged ones are named and set aside under another name, once one before them was found whole. Several hosts
        cannot look further: DamagedCheckpoint is raised, and their next start looks. InputError where none is whole,
        OSError where one cannot be read for another reason, such as missing rights: that one stays where it is.
        """
        damaged = {}
        for step in sorted(_steps(self._folder), reverse=True):
            try:
                restored = self._restore(step, like)
                break
            except Exception as error:
                cause, path = _root(error), self._folder / str(step)
                hosts.end_with_another()
                if not isinstance(cause, (OSError, MemoryError, RuntimeError, ValueError, LookupError)):
                    raise
                if not _is_damage(cause):
                    raise OSError(
                        f"checkpoint {path} cannot be read ({_first_line(cause)}). It may be whole, and stays; once it "
                        "can be read, the same command goes on from there"
                    ) from error
                damaged[step] = f"checkpoint {path} is damaged ({_first_line(cause)})"
                if hosts.several():
                    self._set_aside(step)
                    raise DamagedCheckpoint(
                        f"{damaged[step]} and was set aside; the same command goes on from the one before it"
                    ) from error
        else:
            damaged |= {path.name: f"{path} was set aside" for path in self._folder.glob(f"*.{_ASIDE}*")}
            if damaged:
                raise InputError(f"{'; '.join(damaged.values())}. None is whole: use another workdir to begin anew")
            return None
        for step, reason in damaged.items():
            aside = self._set_aside(step)
            console.print(f"{reason} and set aside as {aside.name}", style="yellow", highlight=False, markup=False)
        self._manager.reload()
        return restored

    def close(self) -> None:
        """Waits until everything is written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error
        finally:
            self._manager.close()

    def _restore(self, step: int, like: TrainState) -> Restored:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=arguments)
        if fingerprint(restored.state) != restored.facts["fingerprint"]:
            raise ValueError("its numbers are not those that were saved")
        facts = {name: restored.facts[name] for name in ("data_position", "data", "recipe")}
        return Restored(step, restored.state, **facts)

    def _set_aside(self, step: int) -> Path:
        names = (self._folder / f"{step}.{_ASIDE}{number or ''}" for number in itertools.count())
        aside = next(name for name in names if not name.exists())
        with contextlib.suppress(FileNotFoundError):  # where another host did it
            (self._folder / str(step)).rename(aside)
        return aside

    def _unwritten(self, error: Exception) -> OSError:
        """Says what to raise where writing failed; where another process has gone, which can cause it, this ends."""
        hosts.end_with_another()
        step = max(_steps(self._folder), default=None)
        newest = "no checkpoint is there yet" if step is None else f"the newest whole one is of step {step}"
        return OSError(
            f"a checkpoint cannot be written to {self._folder} ({_first_line(error)}); {newest}. "
            "Once there is room, the same command goes on from there"
        )


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def _root(error: BaseException) -> BaseException:
    while deeper := error.__cause__ or (error.__context__ if type(error) is Exception else None):
        error = deeper
    return error


def _is_damage(cause: BaseException) -> bool:
    """Returns whether an error lies in what a checkpoint holds, and not in storage, rights, memory or other hosts."""
    if status := _STATUS.match(str(cause)):
        return status[0] in _DAMAGED
    return isinstance(cause, (ValueError, LookupError, FileNotFoundError))


def _first_line(error: BaseException) -> str:
    """Returns what an error says, shortened: those of array storage go on for pages, and name the cause last."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 2 * _SAID else f"{line[:_SAID]} ... {line[-_SAID:]}"
