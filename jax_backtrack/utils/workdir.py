"""A workdir: the names of its files, which are written whole or not at all, and none of which may lead out of it."""

import contextlib
import errno
import fcntl
import glob
import os
import secrets
from pathlib import Path
from typing import BinaryIO

from etils import epath

from jax_backtrack.errors import InputError

# Left by training.
RECIPE = "recipe.json"  # that the run was begun with
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_RUN = "wandb_run.json"
CHECKPOINTS = "checkpoints"
EXPORT = "export"  # the trained model, a Hugging Face folder
# Left by the other modes.
SAMPLES = "samples.jsonl"
MT_BENCH = "mt_bench.jsonl"
EVALUATION, EVALUATION_PAGE = "evaluation.json", "evaluation.html"
COMPARISON_PAGE, WIN_RATES = "comparison.html", "win_rates.json"
AGREEMENT = "agreement.json"  # of a probe with its labels
REPLICATION, REPLICATION_PLOT = "results.json", "results.svg"
SHOWN_DATA, DATA_ACCOUNT = "data.jsonl", "account.json"
COMPILED = "compile.json"


def atomic_write(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file: it is there whole, or as it was before, also after a power cut. Its folder is made.

    Several processes may write one file; the last one wins. A bucket's objects are whole by themselves.
    """
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):
        path.write_bytes(content)
    else:
        _write_and_rename(Path(path), content)


def _write_and_rename(path: Path, content: bytes) -> None:
    beginning = f"{path.name}.writing-"
    for left in path.parent.glob(f"{glob.escape(beginning)}*"):
        _remove_unless_locked(left)
    writing = path.with_name(f"{beginning}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _opened_and_locked(writing) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            writing.rename(path)
    except BaseException:
        writing.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _opened_and_locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("wb")
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:  # or another process took it for left over, before it was locked
            return file
        file.close()


def _remove_unless_locked(left: Path) -> None:
    """Removes what a killed process left; a file that a living one writes is locked."""
    with contextlib.suppress(OSError), left.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left.unlink()


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, would outlast a power cut."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot
            raise
    finally:
        os.close(number)


def check_links(workdir: Path) -> None:
    """Raises InputError where an entry of the workdir is a link out of it. The workdir itself may be a link."""
    if not workdir.is_dir():
        return
    root = workdir.resolve()
    for entry in sorted(workdir.iterdir()):
        if entry.is_symlink() and not (target := entry.resolve()).is_relative_to(root):
            raise InputError(
                f"{entry} is a link to {target}, out of the workdir: nothing is written or deleted through it. "
                "Put the whole workdir where there is room"
            )
